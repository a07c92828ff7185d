"""Shards to batches by Ray Data: the CPUs of the whole cluster read and decode for the training processes.

    places of this rank ─► tasks: row groups ─► clips as bytes ─► object store ─► batches, in order

The same batches as :func:`mp3d.data.batches.training_loader` gives, bit for bit: every place of the training stream is
a function of the seed, and the order is kept. So a run may change from one to the other when it is resumed, which needs
no stored position here either. Each training process executes its own plan for one epoch: ranks need not agree on
anything, and none gets more steps than another.

Clips travel as int16 (or uint8), never as float32, which would double the bytes; truths as safetensors.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load, save
from torch import Tensor

from mp3d.data.batches import Batch, ClipDataset, SliceInfo, collate
from mp3d.data.stream import Place, Stream
from mp3d.errors import DataError, Mp3dError, as_json, from_json
from mp3d.sample import Clip, Target

CLIPS_PER_TASK = 16
"""At least: a task costs milliseconds, whatever it does. Sixteen windows of nine slices of 512 x 512 are 75 MB."""
Part = tuple[Clip, list[Target], list[SliceInfo]]


def ray_batches(
    dataset: ClipDataset, stream: Stream, *, batch_size: int, steps: range, rank: int, world_size: int
) -> Iterator[Batch]:
    """Batches of one rank for a range of global steps; Ray is initialised and has a CPU that nobody holds.

    Raises:
        DataError: the shards cannot be read, as in :class:`mp3d.data.batches.ClipDataset`.
    """
    import ray.data

    from mp3d.data.part import quiet_ray_data

    places = [
        stream.place((step * world_size + rank) * batch_size + number) for step in steps for number in range(batch_size)
    ]
    per_task = max(1, CLIPS_PER_TASK // batch_size) * batch_size
    quiet_ray_data()
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        rows = ray.data.range(len(places), override_num_blocks=-(-len(places) // per_task))
        reader = cast(Callable[[Any], Any], _Reader(dataset, places))
        read = rows.map_batches(reader, batch_size=None, batch_format="numpy", num_cpus=1)
        tables: Iterable[Any] = read.iter_batches(batch_size=batch_size, batch_format="pyarrow", prefetch_batches=4)
        count = 0
        for table in tables:
            count += table.num_rows
            yield collate(list(_parts(table)))
    if count != len(places):
        raise DataError(f"Ray Data delivered {count} clips of {len(places)}; set launch.ingest to pyarrow")


class _Reader:
    """What a task does: the clips of some places, as a table of bytes. It travels to each process once."""

    def __init__(self, dataset: ClipDataset, places: list[Place]) -> None:
        self.dataset, self.places = dataset, places

    def __call__(self, rows: dict[str, np.ndarray]) -> pa.Table:
        try:
            return _table([self.dataset[self.places[number]] for number in rows["id"].tolist()])
        except Mp3dError as error:  # else Ray would wrap it, and print where it was
            return _table([], as_json(error))


def _table(parts: list[Part], error: str | None = None) -> pa.Table:
    """One row for each clip; or one that says why there are none."""
    clips = [np.ascontiguousarray(clip.slices.numpy()) for clip, _, _ in parts]
    truths = [
        save(
            {
                f"{number}.{name}": cast(Tensor, value).contiguous()
                for number, target in enumerate(targets)
                for name, value in target.items()
            }
        )
        for _, targets, _ in parts
    ]
    facts = [
        json.dumps(
            {
                "dtype": array.dtype.str,
                "shape": array.shape,
                "key_slices": clip.key_slices,
                "num_targets": len(targets),
                "infos": [asdict(info) for info in infos],
            }
        )
        for array, (clip, targets, infos) in zip(clips, parts, strict=True)
    ]
    if error is not None:
        clips, truths, facts = [np.zeros(0, np.uint8)], [b""], [json.dumps({"error": error})]
    return pa.table(
        {
            "slices": pa.array([array.data.cast("B") if array.size else b"" for array in clips], pa.large_binary()),
            "truth": pa.array(truths, pa.large_binary()),
            "facts": pa.array(facts, pa.large_string()),
        }
    )


def _parts(table: pa.Table) -> Iterator[Part]:
    slices = [view for chunk in table["slices"].chunks for view in _views(chunk)]
    for view, truth, text in zip(slices, table["truth"].to_pylist(), table["facts"].to_pylist(), strict=True):
        facts: dict[str, Any] = json.loads(text)
        if "error" in facts:
            raise from_json(facts["error"])
        array = np.frombuffer(view, facts["dtype"]).reshape(facts["shape"]).copy()  # Arrow's memory is read-only
        targets: list[dict[str, Tensor]] = [{} for _ in range(facts["num_targets"])]
        for key, value in load(truth).items():
            number, name = key.split(".", 1)
            targets[int(number)][name] = value
        infos = [SliceInfo(**info | {"spacing_mm": _tuple(info["spacing_mm"])}) for info in facts["infos"]]
        yield Clip(torch.from_numpy(array), tuple(facts["key_slices"])), [Target(**target) for target in targets], infos


def _views(chunk: pa.LargeBinaryArray) -> list[memoryview]:
    """Of the values of a chunk, without a copy."""
    _, offsets, content = chunk.buffers()
    bounds = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
    memory = memoryview(content)
    return [memory[start:stop] for start, stop in pairwise(bounds)]


def _tuple(values: list[float] | None) -> Any:
    return None if values is None else tuple(values)
