"""Released weights as checkpoints: what moves, what does not, what is refused, and that nothing in a file is run."""

import json
import re
from pathlib import Path

import pytest
import torch

from mp3d import released_worker
from mp3d.checkpoint import open_checkpoint
from mp3d.config import ClipConfig, EvaluateConfig
from mp3d.convert import ConvertConfig, convert, main, plan_conversion
from mp3d.errors import CheckpointError, ConfigError, Refusal
from mp3d.evaluation import KeySlicePredictor
from mp3d.launch import run_training
from mp3d.models import build_model
from mp3d.models.released import authors_shapes, our_name
from mp3d.models.transfer import initialise_backbone
from mp3d.predict import Predictor
from mp3d.recipes import deeplesion_acs18, deeplesion_i3d18, deeplesion_resnet2d50
from mp3d.sample import Clip
from tests.released_files import FASTER_RCNN, made_state, save, wrapped
from tests.test_transfer import planar
from tests.tiny import ct_shards, detector_config

MP3D18BA = authors_shapes("mp3d18ba", group_norm=True)
WIDTHS = (64, 128, 256, 512)


def plan(shapes, **changes):
    return plan_conversion(shapes, ConvertConfig(out="unused", **changes))


def test_a_detector_of_the_authors_moves_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """MP3D from COCO, as old as it is: half precision, wrapped, two prefixes, all parts of a Faster R-CNN, and one that
    we have not.
    """
    monkeypatch.setattr("mp3d.convert.VALUES_AT_ONCE", 100_000)
    backbone = made_state({f"backbone.{key}": shape for key, shape in MP3D18BA.items()}, torch.float16)
    heads = made_state(FASTER_RCNN | {"mask_head.conv.weight": (3, 3)}, torch.float16)
    file = save(wrapped(backbone | heads, prefix="module."), tmp_path / "mp3d.pth", old=True)
    assert main([str(file), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "re-initialised 0, unused 1 of the source" in said
    assert "module.mask_head.conv: weight" in said

    checkpoint = open_checkpoint(tmp_path / "out")
    checkpoint.check_trained()
    model, clip = checkpoint.config.model, checkpoint.config.clip
    assert (model.backbone, model.norm, model.to_2d, clip.num_slices) == ("mp3d18ba", "gn3d", "centre", 3)
    assert (model.head.num_classes, model.head.fpn_channels, model.head.box_features) == (80, 32, 64)
    state = checkpoint.model_state()
    build_model(model, clip).load_state_dict(state)
    assert len(state) == len(backbone) + len(FASTER_RCNN)
    for key, value in backbone.items():
        ours = our_name("mp3d18ba", key.removeprefix("backbone."))
        assert torch.equal(state[f"backbone.backbone.{ours}"], value.float())
    pairs = {
        "neck.lateral_convs.2.conv.weight": "backbone.fpn.inner_blocks.2.0.weight",
        "rpn_head.rpn_reg.bias": "rpn.head.bbox_pred.bias",
        "bbox_head.fc_cls.weight": "roi_heads.box_predictor.cls_score.weight",
    }
    for theirs, ours in pairs.items():
        assert torch.equal(state[ours], heads[theirs].float())
    boxes = heads["bbox_head.fc_reg.weight"].float()
    assert torch.equal(state["roi_heads.box_predictor.bbox_pred.weight"], boxes[4:]), "the background has no box here"
    report = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert sorted(report["moved"]) == sorted(state)
    assert report["unused"] == ["module.mask_head.conv.weight"]


@pytest.mark.parametrize(
    ("key", "shape", "wanted"),
    [
        ("neck.lateral_convs.2.conv.bias", (31,), "(32,)"),
        ("neck.fpn_convs.1.conv.weight", (32, 16, 3, 3), "(32, 32, 3, 3)"),
        ("rpn_head.rpn_cls.weight", (3, 31, 1, 1), "(3, 32, 1, 1)"),
        ("bbox_head.shared_fcs.0.weight", (64, 32 * 48), "(64, 1568)"),
        ("bbox_head.fc_reg.bias", (323,), "(320,)"),
    ],
)
def test_a_misshapen_tensor_of_a_head_is_refused_by_name(
    key: str, shape: tuple[int, ...], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    backbone = {f"backbone.{name}": of for name, of in MP3D18BA.items()}
    file = save(wrapped(made_state(backbone | FASTER_RCNN | {key: shape})), tmp_path / "mp3d.pth")
    assert main([str(file), "--out", str(tmp_path / "out")]) == 3
    said = f"{key} has the shape {shape}, and by the file's other tensors it must have {wanted}"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_as_many_boxes_as_scores_are_proposed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    backbone = {f"backbone.{name}": of for name, of in MP3D18BA.items()}
    file = save(wrapped(made_state(backbone | FASTER_RCNN | {"rpn_head.rpn_cls.bias": (7,)})), tmp_path / "mp3d.pth")
    assert main([str(file), "--out", str(tmp_path / "out")]) == 3
    said = "rpn_head.rpn_reg.bias has the shape (12,), and must have four rows for each of rpn_head.rpn_cls.bias"
    assert said in capsys.readouterr().err


def test_other_anchors_are_drawn_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    backbone = {f"backbone.{name}": of for name, of in MP3D18BA.items()}
    anchors = {name: (5 * of[0], *of[1:]) for name, of in FASTER_RCNN.items() if re.search("rpn_(cls|reg)", name)}
    file = save(wrapped(made_state(backbone | FASTER_RCNN | anchors)), tmp_path / "mp3d.pth")
    assert main([str(file), "--out", str(tmp_path / "out")]) == 0
    assert "re-initialised 4, unused 4 of the source" in capsys.readouterr().out


def test_a_bare_backbone_is_trained_from_but_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    group_transforms = {f"groupconv_{i}.weight": (width, 9, 1, 1) for i, width in enumerate(WIDTHS, start=1)}
    state = made_state(MP3D18BA | group_transforms)
    file = save(state, tmp_path / "mp3d.pth")
    out = tmp_path / "converted"
    report = convert(file, ConvertConfig(out=str(out)))
    assert len(report.moved) == len(state)
    assert {item.key.split(".")[0] for item in report.reinitialised} == {"backbone", "rpn", "roi_heads"}
    assert all(".fpn." in item.key for item in report.reinitialised if item.key.startswith("backbone"))
    checkpoint = open_checkpoint(out)
    assert (checkpoint.config.model.to_2d, checkpoint.config.clip) == ("group", ClipConfig())
    shards = ct_shards(tmp_path / "shards", patients=4)
    message = "were not among them, the first backbone.fpn.inner_blocks.0.0.weight; train from it"
    with pytest.raises(CheckpointError, match=message):
        Predictor.open(out)
    with pytest.raises(CheckpointError, match=message):
        KeySlicePredictor(EvaluateConfig(checkpoint=str(out), shards=str(shards), out="unused"))

    changes = {"model__width": 1.0, "loop__epochs": 1, "loop__steps_per_epoch": 1, "optim__lr": 1e-9}
    run = run_training(detector_config(shards, tmp_path, init_from=str(out), **changes))
    capsys.readouterr()
    trained = open_checkpoint(run).model_state()
    for key, value in state.items():
        if not key.startswith("groupconv"):
            ours = trained[f"backbone.backbone.{our_name('mp3d18ba', key)}"]
            torch.testing.assert_close(ours, value, atol=1e-6, rtol=0)


def test_a_classifier_of_the_authors_moves_with_its_head(tmp_path: Path):
    """VDT from ImageNet: batch norm, bare names."""
    shapes = authors_shapes("resnet3d18", group_norm=False)
    state = made_state(shapes | {"head.fc.weight": (1000, 512), "head.fc.bias": (1000,)})
    report = convert(save(wrapped(state), tmp_path / "r18.pth"), ConvertConfig(out=str(tmp_path / "out")))
    assert (report.reinitialised, report.unused, report.inflated) == ((), (), ())
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.config.model.backbone, checkpoint.config.model.norm) == ("resnet3d18", "bn")
    ours = checkpoint.model_state()
    assert torch.equal(ours["fc.weight"], state["head.fc.weight"])
    assert torch.equal(ours["backbone.stage4.1.conv2.conv.weight"], state["layer4.1.conv2.weight"])
    assert int(ours["backbone.stem.layers.0.norm.num_batches_tracked"]) == 7
    build_model(checkpoint.config.model, checkpoint.config.clip).load_state_dict(ours)


def test_torchvisions_network_answers_the_same_in_3d(tmp_path: Path):
    """Inflated by the centre rule: grey pictures of three equal planes get the very logits."""
    network = planar("18")
    file = save(network.state_dict(), tmp_path / "resnet18.pth")
    report = convert(file, ConvertConfig(out=str(tmp_path / "out")))
    assert report.reinitialised == report.unused == ()
    assert len(report.inflated) == 17
    assert "backbone.stem.layers.0.conv.weight" in report.inflated
    assert "backbone.stage2.0.shortcut.conv.weight" in report.moved
    checkpoint = open_checkpoint(tmp_path / "out")
    model = build_model(checkpoint.config.model, checkpoint.config.clip).eval()
    model.load_state_dict(checkpoint.model_state())
    clips = [Clip(torch.randint(0, 256, (1, 64, 64), dtype=torch.uint8).expand(3, -1, -1), (1,)) for _ in range(2)]
    with torch.no_grad():
        batch, _ = model.transform(clips, image_size=64)
        expected = network(batch.tensors[:, 0])
        for prediction, logits in zip(model(clips, image_size=64), expected, strict=True):
            torch.testing.assert_close(prediction["logits"], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (deeplesion_i3d18, {"inflate": "mean"}),
        (deeplesion_acs18, {"inflate": "acs"}),
        (deeplesion_resnet2d50, {"backbone": "resnet2d50"}),
    ],
)
def test_recipes_of_the_comparisons_start_from_torchvisions_networks(tmp_path: Path, recipe, options: dict):
    """As their docstrings say: every tensor of the backbone has a counterpart."""
    config = recipe()
    file = save(planar(config.model.backbone.removeprefix("resnet")[2:]).state_dict(), tmp_path / "resnet.pth")
    convert(file, ConvertConfig(out=str(tmp_path / "out"), **options))
    model = build_model(config.model, config.clip)
    report = initialise_backbone(model, open_checkpoint(tmp_path / "out").model_state())
    prefix = "backbone.backbone."
    assert sorted(report.moved) == sorted(key for key in model.state_dict() if key.startswith(prefix))
    assert all(key.startswith("fc.") for key in report.unused)


def test_torchvisions_network_stays_2d_where_that_is_asked(tmp_path: Path):
    network = planar("18")
    file = save(network.state_dict(), tmp_path / "resnet18.pth")
    report = convert(file, ConvertConfig(out=str(tmp_path / "out"), backbone="resnet2d18", inflate="acs"))
    assert report.inflated == report.reinitialised == ()
    kernel = open_checkpoint(tmp_path / "out").model_state()["backbone.stem.layers.0.conv.weight"]
    assert torch.equal(kernel[:, :, 0], network.state_dict()["conv1.weight"])


def test_what_a_file_becomes():
    """Without reading any value."""
    coco = {f"backbone.{key}": shape for key, shape in authors_shapes("resnet3d50", group_norm=True).items()}
    found = plan(coco)
    assert (found.model.backbone, found.model.norm, found.model.head.kind) == ("resnet3d50", "gn3d", "detection")
    assert (found.model.to_2d, found.clip.num_slices) == ("centre", 3)
    mp3d63 = authors_shapes("mp3d63", group_norm=True)
    assert plan(mp3d63).model.backbone == "mp3d63"
    with_transforms = mp3d63 | {
        f"groupconv_{i}.weight": (w, 3, 1, 1) for i, w in enumerate((256, 512, 1024, 2048), start=1)
    }
    for shapes in (mp3d63, with_transforms):  # the released MP3D-63 has been trained with group transforms
        pooled = plan(shapes, backbone="p3d63")
        assert (pooled.model.backbone, pooled.clip) == ("p3d63", ClipConfig())
        assert not set(pooled.backbone.values()) & (set(with_transforms) - set(mp3d63))
    dense = plan(MP3D18BA | {f"conv3d_all_{i}.weight": (w, w, 9, 1, 1) for i, w in enumerate(WIDTHS, start=1)})
    assert (dense.model.to_2d, dense.clip.num_slices) == ("dense", 9)
    flat = authors_shapes("resnet2d50", group_norm=False)
    assert plan(flat).model.backbone == "resnet3d50"
    assert plan(flat).model.strides.pool == "1x3x3"
    assert plan(flat, inflate="mean").model.strides.pool == "3x3x3"


def test_weights_that_do_not_fit_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"the authors' mp3d18ba has no tensor 'layer3.7.conv1.weight'"):
        plan(MP3D18BA | {"layer3.7.conv1.weight": (1,)})
    with pytest.raises(CheckpointError, match=r"conv1_custom.weight has the shape \(64, 2, 1, 7, 7\), and in the auth"):
        plan(MP3D18BA | {"conv1_custom.weight": (64, 2, 1, 7, 7)})
    with pytest.raises(CheckpointError, match=r"the authors' mp3d63 has no tensor|has the shape"):
        plan(MP3D18BA, backbone="mp3d63")
    with pytest.raises(CheckpointError, match=r"groupconv_1.weight has the shape \(64, 64, 9, 1, 1\), and in the"):
        plan(MP3D18BA | {"groupconv_1.weight": (64, 64, 9, 1, 1)})
    with pytest.raises(CheckpointError, match=r"groupconv_1.weight has the shape \(32, 9, 1, 1\)"):
        plan(MP3D18BA | {"groupconv_1.weight": (32, 9, 1, 1)}, backbone="p3d18ba")
    with pytest.raises(CheckpointError, match=r"weight \[3, 9\] slices; it must be one odd number for all"):
        plan(MP3D18BA | {"groupconv_1.weight": (64, 9, 1, 1), "groupconv_2.weight": (128, 3, 1, 1)})
    flat = authors_shapes("resnet2d18", group_norm=False)
    for backbone in ("mp3d63", "resnet3d18_v1c"):
        with pytest.raises(ConfigError, match=f"backbone is {backbone}: 2D weights, and only they, become resnet2d18"):
            plan(flat, backbone=backbone)
    with pytest.raises(ConfigError, match="backbone is resnet2d18: 2D weights, and only they"):
        plan(MP3D18BA, backbone="resnet2d18")


class Exploit:
    """Runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    marker = tmp_path / "ran"
    file = save(wrapped(made_state({"conv1.weight": (2, 2)})) | {"hook": Exploit(marker)}, tmp_path / "hostile.pth")
    assert main([str(file), "--out", str(tmp_path / "out")]) == 3
    with pytest.raises(Refusal, match="beside tensors, which is not opened"):
        released_worker.list_tensors(save({"hook": Exploit(marker)}, tmp_path / "old.pth", old=True))
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file} cannot be read: it holds ")
    assert "which is not opened" in error
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file is as hostile as the test says"


def test_a_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.pth").write_bytes(b"<html>not found</html>")
    assert main([str(tmp_path / "text.pth"), "--out", str(tmp_path / "out")]) == 3
    assert "text.pth cannot be read: " in capsys.readouterr().err
    assert main([str(tmp_path / "none.pth"), "--out", str(tmp_path / "out")]) == 3
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert main([str(tmp_path / "text.pth"), "--out", str(tmp_path / "full")]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds no state dict"),
        ({"state_dict": {"conv1.weight": torch.zeros(2), "name": "r18"}}, "it holds no state dict"),
        ({"conv1.weight": torch.zeros(1).expand(10**12)}, "its tensor 'conv1.weight' is no plain array of numbers"),
        ({"conv1.weight": torch.zeros(2, 2).to_sparse()}, "its tensor 'conv1.weight' is no plain array of numbers"),
        ({"conv1.weight": torch.zeros(2, dtype=torch.complex64)}, "'conv1.weight' is no plain array of numbers"),
        ({"conv1.weight": torch.zeros(2, dtype=torch.int8)}, "'conv1.weight' is no plain array of numbers"),
    ],
)
def test_a_worker_refuses_what_is_no_state_dict(tmp_path: Path, content: object, message: str):
    with pytest.raises(Refusal, match=message):
        released_worker.list_tensors(save(content, tmp_path / "odd.pth"))


def test_a_worker_hands_tensors_out_in_pieces(tmp_path: Path):
    """In C order, whatever lies in the file."""
    tensor = torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4).permute(2, 0, 1)
    file = save({"a": tensor, "count": torch.tensor(5)}, tmp_path / "odd.pth")
    assert released_worker.list_tensors(file) == ([["a", [4, 2, 3]], ["count", []]], None)
    pieces = [released_worker.read_values(file, "a", first, 10)[1] for first in (0, 10, 20)]
    assert [len(piece) for piece in pieces] == [10, 10, 4]
    assert torch.equal(torch.cat([torch.from_numpy(piece) for piece in pieces]).reshape(4, 2, 3), tensor.float())
    assert released_worker.read_values(file, "count", 0, 10)[1].tolist() == [5]


def test_a_worker_reads_parameters_and_refuses_what_is_not_finite(tmp_path: Path):
    weights = torch.tensor([1.0, torch.nan])
    file = save({"a": torch.nn.Parameter(weights[:1]), "b": weights}, tmp_path / "odd.pth")
    assert released_worker.read_values(file, "a", 0, 10)[1].tolist() == [1.0]
    with pytest.raises(Refusal, match="its tensor 'b' has values that are not finite"):
        released_worker.read_values(file, "b", 0, 10)
