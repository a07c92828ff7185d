"""Two workers do what one does on the same global batches, whatever falls on each of them; no Ray, gloo alone."""

from typing import Any

import pytest
import torch

from mp3d.config import SegmentationHead, TrainConfig
from tests.tiny import ball_config, ball_shards, classifier_config, ct_shards, detector_config, picture_shards
from tests.two_workers import Case, both, in_two_processes

STEPS = 2


def dealt(config: TrainConfig, clips: int, *, accumulate: int = 1) -> Case:
    """``clips`` a step in one batch of one worker, and in ``accumulate`` batches of each of two."""
    plain = config.override({"optim.clip_grad_norm": None, "optim.algorithm": "sgd", "optim.lr": 1e-3})
    return Case(
        two=plain.override(
            {
                "loop.batch_size": clips // (2 * accumulate),
                "loop.accumulate": accumulate,
                "loop.num_workers": 2,
                "loop.sync_batch_norm": plain.model.norm == "bn",
            }
        ),
        one=plain.override({"loop.batch_size": clips}),
        steps=STEPS,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    ct, pictures = ct_shards(folder / "ct", patients=6), picture_shards(folder / "pictures")
    balls = ball_shards(folder / "balls")
    windows = detector_config(ct, folder, loop__negatives=1.0)
    slabs = windows.override({"clip.num_key_slices": 9})
    classes = classifier_config(pictures, folder)
    masks = ball_config(balls, folder, SegmentationHead(dropout=0))
    normalised = {"model.norm": "bn"}
    cases = {
        "windows": dealt(windows, 2),
        "slabs, accumulated": dealt(slabs, 4, accumulate=2),
        "classes, accumulated": dealt(classes, 8, accumulate=2),
        "classes, batch norm": dealt(classes.override(normalised), 8),
        "masks": dealt(masks, 4),
        "masks, batch norm": dealt(masks.override(normalised), 4),
        "masks, a Dice over the batch": dealt(masks.override({"model.head.dice_over": "batch"}), 4),
    }
    whole = slabs.override(
        {
            "name": "whole", "loop.num_workers": 2, "loop.batch_size": 1, "loop.steps_per_epoch": None,
            "loop.accumulate": 2, "loop.ema_decay": 0.9, "loop.balance": "patients", "loop.allowed_skips": 1,
            "loop.patience": 5, "loop.epochs": 1, "loop.sync_batch_norm": True, "model.norm": "bn",
            "augment.preset": "light",
        }
    )  # fmt: skip
    return in_two_processes(both, (cases, whole), folder)


@pytest.fixture(scope="module")
def found(results: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    return [gradients for _, gradients in results]


def test_a_whole_run_ends_with_the_same_weights_on_both(results: list[tuple[dict[str, Any], dict[str, Any]]]):
    """Nine key slices and nine empty ones, in steps of four clips: no rank waits for the other for ever."""
    (first, _), (second, _) = results
    assert first["steps"] == second["steps"] == 18 // 4
    assert first["metrics"] == second["metrics"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])


@pytest.mark.parametrize(
    "case",
    [
        "windows", "slabs, accumulated", "classes, accumulated", "classes, batch norm", "masks",
        "masks, batch norm", "masks, a Dice over the batch",
    ],
)  # fmt: skip
def test_two_workers_have_the_gradient_of_one(found: list[dict[str, Any]], case: str):
    first, second, alone = found[0][case]["two"], found[1][case]["two"], found[0][case]["one"]
    for here, there, one in zip(first, second, alone, strict=True):
        scale = max(gradient.abs().max().item() for gradient in one["gradient"].values())
        assert scale > 1e-3
        for name, gradient in one["gradient"].items():
            assert torch.equal(here["gradient"][name], there["gradient"][name])
            torch.testing.assert_close(here["gradient"][name], gradient, rtol=1e-6, atol=1e-6 * scale)
        for name, loss in one["losses"].items():
            assert (here["losses"][name] + there["losses"][name]) / 2 == pytest.approx(loss, rel=1e-6)


def test_their_batches_were_as_uneven_as_can_be(found: list[dict[str, Any]]):
    windows = [step["boxes"] for rank in found for step in rank["windows"]["two"]]
    assert 0 in windows
    assert any(windows)
    pairs = zip(found[0]["slabs, accumulated"]["two"], found[1]["slabs, accumulated"]["two"], strict=True)
    assert any(first["key_slices"] != second["key_slices"] for first, second in pairs)
