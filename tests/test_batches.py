"""Reading clips from shards, and the training stream as a pure function of the seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mp3d.config import AugmentConfig, ClipConfig
from mp3d.data.batches import (
    ClipDataset,
    evaluation_batches,
    read_clip,
    training_loader,
)
from mp3d.data.samples import Sample, annotated_samples, classified_samples
from mp3d.data.shard import ShardSet, open_shards
from mp3d.data.stream import Stream
from mp3d.errors import DataError
from tests.tiny import BRIGHT_HU, blob_series, ct_shards, picture_shards

CLIP = ClipConfig(image_size=32)
SLAB = CLIP.override({"num_key_slices": 9})
NO_CHANGE = AugmentConfig(horizontal_flip=0, z_flip=0)
PLANES = ClipConfig(num_slices=3, slice_spacing_mm=None, image_size=24)


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return open_shards(ct_shards(tmp_path_factory.mktemp("ct") / "shards"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return open_shards(picture_shards(tmp_path_factory.mktemp("pictures") / "shards"))


def test_a_clip_is_the_slices_around_its_key_slice(ct: ShardSet):
    samples, _ = annotated_samples(ct, "train")
    clip, (target,), info = read_clip(ct, samples[0], CLIP)
    stored = [blob_series(i) for i in range(0, 8, 2)]
    source = next(
        s for s in stored if torch.equal(torch.from_numpy(s.volume.hu[samples[0].row].copy()), clip.slices[4])
    )
    assert clip.key_slices == (4,)
    np.testing.assert_array_equal(clip.slices, source.volume.hu[samples[0].row - 4 : samples[0].row + 5])
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert clip.slices[4, y1:y2, x1:x2].float().mean() > BRIGHT_HU / 2
    assert info.z_index == samples[0].row


def test_key_slices_are_those_with_boxes_and_negatives_were_searched(ct: ShardSet):
    positives, none = annotated_samples(ct, "train")
    _, spare = annotated_samples(ct, "train", negatives=1.0)
    assert len(positives) == 4 * 3
    assert none == []
    assert len(spare) == 4 * 8
    _, (target,), _ = read_clip(ct, spare[0], CLIP)
    assert target["boxes"].shape == (0, 4)


def test_pictures_come_as_planes_with_their_label(pictures: ShardSet):
    samples = classified_samples(pictures, "train")
    assert len(samples) == 24
    for sample in samples[:4]:
        clip, (target,), _ = read_clip(pictures, sample, PLANES)
        assert clip.slices.shape == (3, 24, 24)
        assert clip.slices.dtype == torch.uint8
        assert (clip.slices.float().mean() > 100) == bool(target["label"])


def test_pictures_do_not_fit_a_ct_clip(pictures: ShardSet):
    with pytest.raises(DataError, match="num_slices must be 3"):
        read_clip(pictures, classified_samples(pictures, "val")[0], CLIP)


def test_an_unknown_split_names_those_there(ct: ShardSet):
    with pytest.raises(DataError, match="only in: test, train, val"):
        annotated_samples(ct, "training")


def test_every_pass_holds_each_positive_once_and_fresh_negatives(ct: ShardSet):
    positives, spare = annotated_samples(ct, "train", negatives=0.5)
    stream = Stream(positives, spare, negatives=0.5, seed=3)
    assert len(stream) == 12 + 6
    passes = [[stream.place(n * 18 + i).sample for i in range(18)] for n in range(3)]
    for one in passes:
        assert sorted(index for index in one if index < 12) == list(range(12))
        assert len({index for index in one if index >= 12}) == 6
    assert passes[0] != passes[1]


def test_the_stream_is_a_function_of_seed_and_position(ct: ShardSet):
    positives, spare = annotated_samples(ct, "train")
    one, same, other = (Stream(positives, spare, negatives=0, seed=seed) for seed in (1, 1, 2))
    assert [one.place(i) for i in range(40)] == [same.place(i) for i in reversed(range(40))][::-1]
    assert [one.place(i).sample for i in range(40)] != [other.place(i).sample for i in range(40)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_global_batches_in_equal_steps(ct: ShardSet, world_size: int):
    positives, spare = annotated_samples(ct, "train")
    stream = Stream(positives, spare, negatives=0, seed=0)
    dataset = ClipDataset(ct, stream.samples, CLIP)
    batch_size = 6 // world_size
    loaders = [
        training_loader(
            dataset, stream, batch_size=batch_size, steps=range(2, 6), rank=rank, world_size=world_size, workers=0
        )
        for rank in range(world_size)
    ]
    dealt = [[(info.series, info.z_index) for batch in loader for info in batch.infos] for loader in loaders]
    assert {len(per_rank) for per_rank in dealt} == {4 * batch_size}
    whole = [stream.samples[stream.place(i).sample] for i in range(12, 36)]
    assert sorted(pair for per_rank in dealt for pair in per_rank) == sorted((s.entry.series, s.row) for s in whole)


def test_augmentation_depends_on_the_place_not_on_the_reading_order(ct: ShardSet):
    positives, spare = annotated_samples(ct, "train")
    stream = Stream(positives, spare, negatives=0, seed=0)
    dataset = ClipDataset(ct, stream.samples, CLIP, AugmentConfig(), seed=5)
    places = [stream.place(i) for i in range(6)]
    forwards = [dataset[place][0].slices for place in places]
    backwards = [dataset[place][0].slices for place in reversed(places)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_evaluation_sees_every_sample_once_over_all_ranks(ct: ShardSet):
    samples, _ = annotated_samples(ct, "val")
    dataset = ClipDataset(ct, samples, CLIP)
    seen = [
        (info.series, info.z_index)
        for rank in range(2)
        for batch in evaluation_batches(dataset, batch_size=4, rank=rank, world_size=2)
        for info in batch.infos
    ]
    assert sorted(seen) == sorted((sample.entry.series, sample.row) for sample in samples)


def test_a_slab_carries_the_truth_of_every_annotated_slice_in_its_middle(ct: ShardSet):
    """The boxes lie on rows 4, 5 and 6 of 11."""
    samples, _ = annotated_samples(ct, "train")
    whole = {sample.row: read_clip(ct, sample, CLIP)[1][0] for sample in samples[:3]}
    for place, expected in ((4, (4, 5, 6)), (8, (8, 9, 10)), (11, (11, 12)), (12, (12,))):
        clip, targets, info = read_clip(ct, samples[0], SLAB, place)
        assert clip.slices.shape[0] == 17
        assert clip.key_slices == expected
        assert info.z_index == samples[0].row == 4
        for key, target in zip(clip.key_slices, targets, strict=True):
            assert torch.equal(target["boxes"], whole[4 + key - place]["boxes"])
            x1, y1, x2, y2 = target["boxes"][0].int().tolist()
            assert clip.slices[key, y1:y2, x1:x2].float().mean() > BRIGHT_HU / 2
    clip, targets, _ = read_clip(ct, samples[2], SLAB, 4)
    assert clip.key_slices == (4,), "row 5 would be slice 3 of the slab, where it has too few neighbours"


def test_slices_without_boxes_are_key_slices_only_of_slabs_drawn_for_one(ct: ShardSet):
    """Row 3 stands at 8; rows 0 to 7, all searched, may be key slices."""
    _, spare = annotated_samples(ct, "train", negatives=1.0)
    clip, targets, info = read_clip(ct, spare[3], SLAB, 8)
    assert info.z_index == 3
    assert clip.key_slices == (5, 6, 7, 8, 9, 10, 11, 12)
    assert [len(target["boxes"]) for target in targets] == [0, 0, 0, 0, 1, 1, 1, 0]


def test_a_slab_takes_the_truth_of_a_slice_that_it_shows_mostly(ct: ShardSet):
    """At 2.5 mm in slices of 3.27 mm, row 5 at place 8, the two next to it lie 0.24 slices from rows 4 and 6."""
    samples, _ = annotated_samples(ct, "train")
    assert samples[1].row == 5
    thick = replace(samples[1].entry, spacing_mm=(3.27, 1, 1))
    clip, targets, _ = read_clip(ct, Sample(thick, 5), SLAB, 8)
    assert clip.key_slices == (7, 8, 9)
    for row, target in zip((4, 5, 6), targets, strict=True):
        assert torch.equal(target["boxes"], read_clip(ct, Sample(samples[1].entry, row), CLIP)[1][0]["boxes"])


def test_evaluation_reads_a_slab_with_one_key_slice_in_the_middle(ct: ShardSet):
    samples, _ = annotated_samples(ct, "val")
    for batch in evaluation_batches(ClipDataset(ct, samples, SLAB), batch_size=2):
        assert [clip.key_slices for clip in batch.clips] == [(8,)] * len(batch.clips)
        assert len(batch.targets) == len(batch.infos) == len(batch.clips)
        for clip, target in zip(batch.clips, batch.targets, strict=True):
            x1, y1, x2, y2 = target["boxes"][0].int().tolist()
            assert clip.slices[8, y1:y2, x1:x2].float().mean() > BRIGHT_HU / 2


def test_slabs_are_drawn_by_seed_and_place_and_use_every_place(ct: ShardSet):
    positives, spare = annotated_samples(ct, "train")
    stream = Stream(positives, spare, negatives=0, seed=0)
    one, same, other = (ClipDataset(ct, stream.samples, SLAB, NO_CHANGE, seed) for seed in (1, 1, 2))
    places = [stream.place(i) for i in range(60)]
    drawn = [one[place][0].key_slices for place in places]
    assert [same[place][0].key_slices for place in reversed(places)][::-1] == drawn
    assert [other[place][0].key_slices for place in places] != drawn
    assert {key for keys in drawn for key in keys} == set(range(4, 13))


def test_a_slab_turned_around_keeps_truth_and_slice_together(ct: ShardSet):
    positives, spare = annotated_samples(ct, "train")
    stream = Stream(positives, spare, negatives=0, seed=0)
    turned = ClipDataset(ct, stream.samples, SLAB, NO_CHANGE.override({"z_flip": 1.0}), seed=1)
    for i in range(12):
        clip, targets, _ = turned[stream.place(i)]
        for key, target in zip(clip.key_slices, targets, strict=True):
            x1, y1, x2, y2 = target["boxes"][0].int().tolist()
            assert clip.slices[key, y1:y2, x1:x2].float().mean() > BRIGHT_HU / 2
