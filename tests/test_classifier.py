import pytest
import torch
import torch.nn.functional as F

from mp3d.config import ClassificationHead, ClipConfig, DetectionHead, ModelConfig
from mp3d.models import build_model
from mp3d.models.classifier import ClipClassifier
from mp3d.sample import Clip, Target


def classifier(backbone: str = "resnet3d18", num_classes: int = 3, label_smoothing: float = 0.1) -> ClipClassifier:
    torch.manual_seed(0)
    head = ClassificationHead(num_classes=num_classes, label_smoothing=label_smoothing)
    built = build_model(ModelConfig(backbone=backbone, width=0.125, head=head), ClipConfig(num_slices=3, image_size=64))
    assert isinstance(built, ClipClassifier)
    return built


def pictures(count: int = 6) -> tuple[list[Clip], list[Target]]:
    """Classes differ in the coarseness of their stripes."""
    clips, targets = [], []
    for index in range(count):
        label = index % 3
        stripes = (torch.arange(64) // (2 ** (label + 1)) % 2 * 200).to(torch.uint8)
        clips.append(Clip(stripes.expand(3, 64, 64).contiguous() + index, (1,)))
        targets.append(Target(label=torch.tensor(label)))
    return clips, targets


@pytest.mark.parametrize("backbone", ["mp3d18ba", "mp3d63", "resnet3d18", "resnet3d18_v1c"])
def test_learns_a_handful_of_pictures(backbone):
    model = classifier(backbone)
    clips, targets = pictures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = model(clips, targets)["loss_classification"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_loss_is_the_smoothed_cross_entropy_averaged_over_the_batch():
    model = classifier("mp3d18ba", label_smoothing=0.2)
    clips, targets = pictures(4)
    loss = model(clips, targets)["loss_classification"]
    logits = torch.stack([prediction["logits"] for prediction in model.eval()(clips)])
    truth = torch.full((4, 3), 0.2 / 3)
    truth[torch.arange(4), torch.stack([target["label"] for target in targets])] += 0.8
    expected = -(truth * F.log_softmax(logits, dim=1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_pools_over_slices_rows_and_columns():
    model = classifier("mp3d18ba").eval()
    clips, _ = pictures(2)
    batch, _ = model.transform(clips)
    with torch.no_grad():
        expected = model.fc(model.backbone(batch.tensors)[-1].flatten(2).mean(2))
        predictions = model(clips)
    torch.testing.assert_close(torch.stack([prediction["logits"] for prediction in predictions]), expected)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "targets is None"),
        ([Target(label=torch.tensor(0))], "1 targets for 2 clips"),
        ([Target(label=torch.tensor(0)), Target(boxes=torch.zeros(0, 4))], r"target 1 has \['boxes'\]"),
        ([Target(label=torch.tensor(0)), Target(label=torch.tensor(3))], r"the labels are \[0, 3\]; classes are 0..2"),
        ([Target(label=torch.tensor(-1)), Target(label=torch.tensor(1))], r"the labels are \[-1, 1\]"),
    ],
)
def test_impossible_targets_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        classifier()(pictures(2)[0], targets)


def test_needs_a_classification_head():
    with pytest.raises(TypeError, match="a classifier needs a ClassificationHead"):
        ClipClassifier(ModelConfig(head=DetectionHead()), ClipConfig())
