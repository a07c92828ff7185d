"""Pictures for whoever follows a run: what is true is green, what was answered orange, at the right place."""

from pathlib import Path

import numpy as np
import torch

from mp3d.config import ClipConfig
from mp3d.data.batches import ClipDataset
from mp3d.data.samples import annotated_samples
from mp3d.data.shard import open_shards
from mp3d.models import build_model
from mp3d.sample import Clip
from mp3d.snapshots import FOUND_COLOUR, SIDE_PX, TRUE_COLOUR, draw, take_snapshots
from tests.tiny import ct_shards, detector_config

HU = Clip(torch.full((9, 32, 48), 40, dtype=torch.int16), (4,))


def places(image: np.ndarray, colour: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """First and last row and column of a colour."""
    rows, columns = np.nonzero((image == colour).all(axis=2))
    return [int(rows.min()), int(rows.max())], [int(columns.min()), int(columns.max())]


def test_boxes_are_framed_where_they_are():
    truth = {"boxes": torch.tensor([[4.0, 6, 12, 20]]), "labels": torch.ones(1, dtype=torch.int64)}
    found = {
        "boxes": torch.tensor([[20.0, 8, 40, 30], [1, 1, 2, 2]]),
        "scores": torch.tensor([0.9, 0.1]),
        "labels": torch.ones(2, dtype=torch.int64),
    }
    taken = draw(HU, 4, found, truth, ClipConfig())
    scale = SIDE_PX // 48
    assert taken.image.shape == (32 * scale, 48 * scale, 3)
    assert places(taken.image, TRUE_COLOUR) == ([6 * scale, 20 * scale - 1], [4 * scale, 12 * scale - 1])
    assert places(taken.image, FOUND_COLOUR) == ([8 * scale, 30 * scale - 1], [20 * scale, 40 * scale - 1])
    grey = round((40 + 1024) / (1050 + 1024) * 255 - 0.5)
    assert taken.image[0, 0].tolist() == [grey] * 3
    assert taken.caption == "1 true, 1 found at 0.3, best score 0.90"


def test_masks_are_outlined_and_classes_told():
    mask = torch.zeros(32, 48, dtype=torch.uint8)
    mask[10:20, 5:15] = 1
    logits = torch.zeros(2, 32, 48)
    logits[1, 12:18, 30:40] = 1
    taken = draw(HU, 4, {"mask_logits": logits}, {"mask": mask}, ClipConfig())
    scale = SIDE_PX // 48
    assert places(taken.image, TRUE_COLOUR) == ([10 * scale, 20 * scale - 1], [5 * scale, 15 * scale - 1])
    assert places(taken.image, FOUND_COLOUR) == ([12 * scale, 18 * scale - 1], [30 * scale, 40 * scale - 1])
    assert (taken.image[15 * scale, 10 * scale] != TRUE_COLOUR).any(), "only the outline"
    picture = Clip(torch.randint(0, 255, (3, 32, 48), dtype=torch.uint8), (1,))
    told = draw(picture, 1, {"logits": torch.tensor([0.1, 0.9])}, {"label": torch.tensor(0)}, ClipConfig(num_slices=3))
    assert told.caption == "class 0, answered 1"
    assert np.array_equal(told.image[::scale, ::scale], picture.slices.permute(1, 2, 0).numpy())


def test_the_same_slices_in_every_epoch_and_no_names(tmp_path: Path):
    shards = open_shards(ct_shards(tmp_path / "ct"))
    config = detector_config(tmp_path / "ct", tmp_path)
    samples, _ = annotated_samples(shards, "val")
    dataset = ClipDataset(shards, samples, config.clip)
    model = build_model(config.model, config.clip)
    first, again = (take_snapshots(model, dataset, 3, torch.device("cpu")) for _ in range(2))
    assert len(first) == 3
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert not any(entry.patient in each.caption for each in first for entry in shards.entries)
    assert len(take_snapshots(model, dataset, 99, torch.device("cpu"))) == len(samples)
