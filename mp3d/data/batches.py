"""Shards to batches of clips, by plain pyarrow."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from jaxtyping import Float
from torch.utils.data import DataLoader, Dataset

from mp3d.config import AugmentConfig, ClipConfig
from mp3d.data.augment import augment, augment_block, middle_square
from mp3d.data.blocks import Placement, draw_placement, read_block
from mp3d.data.clips import MOSTLY_SLICE, resample_z, stored_slices, window_positions
from mp3d.data.samples import Sample
from mp3d.data.shard import Row, SeriesEntry, ShardSet, decode_image, decode_truth
from mp3d.data.stream import Place, Stream
from mp3d.errors import DataError, Mp3dError, as_json, from_json
from mp3d.sample import Clip, Target


@dataclass(frozen=True)
class SliceInfo:
    """Which stored slice (or picture) a key slice is."""

    patient: str
    series: str
    z_index: int
    spacing_mm: tuple[float, float, float] | None
    """z, y, x."""
    lesion_types: tuple[str | None, ...] | None = None
    """Of its boxes, as ``instances`` and ``diameters_mm``; None where they are not known."""
    instances: tuple[int, ...] | None = None
    diameters_mm: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Batch:
    """Clips, and per key slice in clip order what is true of it and where it comes from.

    Of a training clip with several key slices, ``infos`` names only the one that it was read for; of a block the stored
    slice in its middle stands for all of them.
    """

    clips: list[Clip]
    targets: list[Target]
    infos: list[SliceInfo]


class ClipDataset(Dataset):
    """Key slices of one split with the slices around them.

    Args:
        augmentation: for training. There the key slice has a random place among those of the clip that may be one, and
            others of them are key slices too (:func:`read_clip`). None: each clip has one, in the middle.
        every_slice: of a block every slice is a key slice, with its mask.
    """

    def __init__(
        self,
        shards: ShardSet,
        samples: list[Sample],
        clip: ClipConfig,
        augmentation: AugmentConfig | None = None,
        seed: int = 0,
        *,
        every_slice: bool = False,
    ) -> None:
        self.shards, self.samples, self.clip = shards, samples, clip
        self.augmentation, self.seed, self.every_slice = augmentation, seed, every_slice

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: Place) -> tuple[Clip, list[Target], list[SliceInfo]]:
        sample = self.samples[place.sample]
        rng = None if self.augmentation is None else np.random.default_rng([self.seed, place.position])
        if self.clip.block is not None:
            return self._block(sample, rng)
        if self.augmentation is None or rng is None:
            clip, targets, info = read_clip(self.shards, sample, self.clip)
            if self.clip.square_pictures:
                planes, targets = middle_square(clip.slices, targets, self.clip.image_size)
                clip = Clip(planes, clip.key_slices)
            return clip, targets, [info]
        key_place = self.clip.num_slices // 2 + int(rng.integers(self.clip.num_key_slices))
        clip, targets, info = read_clip(self.shards, sample, self.clip, key_place)
        square = self.clip.image_size if self.clip.square_pictures else None
        clip, targets = augment(clip, targets, self.augmentation, rng, window=self.clip.window_hu, square=square)
        draws = [place.position * self.clip.num_key_slices + number for number in range(len(targets))]
        for target, draw in zip(targets, draws, strict=True):
            target["draw"] = torch.tensor(draw)
        return clip, targets, [info]

    def _block(self, sample: Sample, rng: np.random.Generator | None) -> tuple[Clip, list[Target], list[SliceInfo]]:
        middle = (sample.entry.num_rows - 1) / 2 if self.clip.block == "centre" else sample.row
        placement = Placement() if self.augmentation is None or rng is None else draw_placement(self.augmentation, rng)
        block = read_block(self.shards, sample.entry, sample.centre or (middle, None, None), self.clip, placement)
        hu, masks = torch.from_numpy(block.hu), torch.from_numpy(block.masks)
        if self.augmentation is not None and rng is not None:
            hu, masks = augment_block(block.hu, block.masks, self.augmentation, rng, self.clip.window_hu)
        info = _info(block.middle, sample.entry)
        if self.every_slice:
            targets = [Target(mask=mask) for mask in masks]
            return Clip(hu, tuple(range(len(hu)))), targets, [info] * len(hu)
        return Clip(hu, (len(hu) // 2,)), [_target(block.middle)], [info]


def read_clip(
    shards: ShardSet, sample: Sample, clip: ClipConfig, place: int | None = None
) -> tuple[Clip, list[Target], SliceInfo]:
    """One clip, interpolated to the spacing of the clip, with the truth of its key slices.

    Args:
        place: of the sample in the clip. Every slice that may be a key slice then is one if it has boxes; and, where
            the sample has none, if it was searched: else a clip drawn for its lesions would weigh nine times one drawn
            for having none. None: the sample is in the middle and the only one.
    """
    entry = sample.entry
    if entry.spacing_mm is None:
        key = shards.read_rows(entry, sample.row, sample.row + 1)[0]
        planes = torch.from_numpy(decode_image(key).copy())
        if len(planes) != clip.num_slices:
            raise DataError(f"{shards.folder} holds pictures of {len(planes)} planes; clip.num_slices must be 3")
        return Clip(planes, (len(planes) // 2,)), [_target(key)], _info(key, entry)
    positions = window_positions(sample.row, entry.num_rows, entry.spacing_mm[0], clip, place)
    first, last = int(np.floor(positions.min())), int(np.ceil(positions.max()))
    rows, stack = shards.read_slices(entry, first, last + 1)
    key_rows = {clip.depth // 2: sample.row} if place is None else _key_rows(entry, positions, clip, place)
    made = Clip(torch.from_numpy(resample_z(stack, positions - first)), tuple(sorted(key_rows)))
    targets = [_target(rows[key_rows[index] - first]) for index in made.key_slices]
    return made, targets, _info(rows[sample.row - first], entry)


def _key_rows(entry: SeriesEntry, positions: Float[np.ndarray, "d"], clip: ClipConfig, place: int) -> dict[int, int]:
    """Index in the clip to row, for ``place`` and for all that may be key slices beside it."""
    radius = clip.num_slices // 2
    allowed = set(entry.rows_with_boxes())
    row = round(float(positions[place]))
    if row not in allowed:
        allowed.update(entry.rows_without_boxes())
    beside = {
        index: other
        for index, other in stored_slices(positions, place, MOSTLY_SLICE).items()
        if other in allowed and other != row and radius <= index < clip.depth - radius
    }
    return {place: row} | beside


def training_loader(
    dataset: ClipDataset,
    stream: Stream,
    *,
    batch_size: int,
    steps: range,
    rank: int,
    world_size: int,
    workers: int,
) -> Iterator[Batch]:
    """Batches of one rank for a range of global steps; where gradients of several batches are summed, each counts as
    one.

    The clips of a global step are the same however they are dealt to ranks.
    """
    places = [[stream.place((step * world_size + rank) * batch_size + i) for i in range(batch_size)] for step in steps]
    return _read_batches(dataset, places, workers)


def batched(batches: Iterable[Batch], number: int) -> Iterator[list[Batch]]:
    """``number`` at a time."""
    remaining = iter(batches)
    while some := list(islice(remaining, number)):
        yield some


def evaluation_batches(
    dataset: ClipDataset, *, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Every sample once, in order, dealt to the ranks; without augmentation."""
    mine = range(rank, len(dataset), world_size)
    places = [[Place(i, i) for i in mine[start : start + batch_size]] for start in range(0, len(mine), batch_size)]
    return _read_batches(dataset, places, workers)


def _read_batches(dataset: ClipDataset, places: list[list[Place]], workers: int) -> Iterator[Batch]:
    for batch in DataLoader(_Reader(dataset), sampler=places, batch_size=None, num_workers=workers):
        if isinstance(batch, str):
            raise from_json(batch)
        yield batch


class _Reader(Dataset):
    """What a process that reads does: the batch of some places, or an error of ours as text, in whose place PyTorch
    would put a traceback.
    """

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, places: list[Place]) -> Batch | str:
        try:
            return collate([self.dataset[place] for place in places])
        except Mp3dError as error:
            return as_json(error)


def collate(parts: list[tuple[Clip, list[Target], list[SliceInfo]]]) -> Batch:
    clips, targets, infos = zip(*parts, strict=True)
    return Batch(list(clips), list(chain.from_iterable(targets)), list(chain.from_iterable(infos)))


def slice_truth(row: Row, entry: SeriesEntry) -> tuple[Target, SliceInfo]:
    """What is true of one stored slice, and which it is."""
    return _target(row), _info(row, entry)


def _info(row: Row, entry: SeriesEntry) -> SliceInfo:
    names = ("lesion_types", "instances", "diameters_mm")
    known = ((None if row.get(name) is None else tuple(row[name])) for name in names)
    return SliceInfo(row["patient"], row["series"], row["z_index"], entry.spacing_mm, *known)


def _target(row: Row) -> Target:
    target: Target = {}
    truth = decode_truth(row)
    if truth.boxes is not None:
        target["boxes"] = torch.from_numpy(truth.boxes.copy())
        labels = np.ones(len(truth.boxes), np.int64) if truth.labels is None else truth.labels
        target["labels"] = torch.from_numpy(labels.copy())
    if row["image_label"] is not None:
        target["label"] = torch.tensor(row["image_label"])
    if truth.mask is not None:
        target["mask"] = torch.from_numpy(truth.mask.copy())
    return target
