"""Frozen stages under every head: they do not move, keep their statistics, and keep nothing for a backward pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mp3d.config import ClassificationHead, ClipConfig, DetectionHead, ModelConfig, SegmentationHead
from mp3d.models import build_model
from mp3d.sample import Clip, Target

SMALL_DETECTION = DetectionHead(fpn_channels=8, box_features=8, rpn_post_nms=(10, 10), box_samples=8)
CLIP = ClipConfig(num_slices=3, slice_spacing_mm=None, image_size=64)
HEADS = {
    "detection": (SMALL_DETECTION, Target(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]))),
    "classification": (ClassificationHead(num_classes=2), Target(label=torch.tensor(1))),
    "segmentation": (SegmentationHead(), Target(mask=torch.ones(64, 64, dtype=torch.uint8))),
}
CLIPS = [Clip(torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8), (1,))] * 2


def model_and_step(
    kind: str, frozen_stages: int, norm: str = "bn", backbone: str = "resnet3d18"
) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    head, target = HEADS[kind]
    model = build_model(
        ModelConfig(backbone=backbone, width=0.125, norm=norm, frozen_stages=frozen_stages, head=head), CLIP
    )

    def step() -> Tensor:
        return torch.stack(list(model(CLIPS, [target, target]).values())).sum()

    return model, step


def parts(model: nn.Module) -> list[nn.Module]:
    backbone = model.backbone.backbone if hasattr(model.backbone, "backbone") else model.backbone
    return [backbone.stem, *backbone.stages]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_parts_keep_weights_and_statistics(kind: str, frozen_stages: int):
    model, step = model_and_step(kind, frozen_stages)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model.eval().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step().backward()
    optimizer.step()
    after = model.state_dict()
    for number, part in enumerate(parts(model)):
        prefix = next(name for name, module in model.named_modules() if module is part)
        moved = {name for name in after if name.startswith(prefix + ".") and not torch.equal(after[name], before[name])}
        if number <= frozen_stages:
            assert moved == set()
        else:
            assert any(name.endswith("conv.weight") for name in moved)
            assert any(name.endswith("running_mean") for name in moved)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("backbone", ["resnet3d18", "mp3d18ba"])
def test_frozen_parts_save_no_tensor_for_a_backward_pass(kind: str, backbone: str):
    model, step = model_and_step(kind, 2, "slice_gn", backbone)
    saved_in = dict.fromkeys(range(5), 0)
    current = [None]
    for number, part in enumerate(parts(model)):
        for module in part.layers if number == 0 else part:
            module.register_forward_pre_hook(lambda *_, number=number: current.__setitem__(0, number))
            module.register_forward_hook(lambda *_: current.__setitem__(0, None))

    def pack(tensor: Tensor) -> Tensor:
        if current[0] is not None:
            saved_in[current[0]] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    loss.backward()
    assert [saved_in[number] for number in (0, 1, 2)] == [0, 0, 0]
    assert all(saved_in[number] > 0 for number in (3, 4))
    assert all(parameter.grad is None for part in parts(model)[:3] for parameter in part.parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_what_a_frozen_part_hands_on_has_no_graph(kind: str):
    model, step = model_and_step(kind, 1)
    handed_on: list[Tensor] = []
    last_frozen, first_trained = parts(model)[1][-1], parts(model)[2][0]
    last_frozen.register_forward_hook(lambda _module, _inputs, output: handed_on.append(output))
    first_trained.register_forward_hook(lambda _module, _inputs, output: handed_on.append(output))
    step()
    frozen, trained = handed_on
    assert not frozen.requires_grad
    assert trained.requires_grad
