"""The work of one task of :mod:`mp3d.data.prepare`: a few items to one Parquet file and its sidecar."""

import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from traceback import extract_tb
from typing import Any

from mp3d.data.series import CTSeries
from mp3d.data.shard import (
    Origin,
    PartWriter,
    Reject,
    Row,
    SeriesEntry,
    count_rows,
    entry_as_dict,
    entry_from_dict,
    hashed_id,
    is_disk_full,
    is_not_writable,
    json_text,
    picture_rows,
    series_rows,
    write_aside,
)
from mp3d.data.source import Item
from mp3d.data.time_limit import Overdue, time_limit
from mp3d.errors import DataError, Refusal

Refused = Sequence[tuple[str, Refusal]]

ITEM_TIMEOUT_S = 1800.0
"""A series takes seconds, a few minutes where it is large, compressed, and on a slow disk."""
MAX_TRIES = 3
"""How often a task is repeated whose process ended on the same item."""


@dataclass(frozen=True)
class Part:
    """Items that share a Parquet file, and the split of each."""

    index: int
    items: tuple[Item, ...]
    splits: tuple[str, ...]
    folder: Path
    origin: Origin
    timeout_s: float = ITEM_TIMEOUT_S
    """For reading one item."""

    @property
    def sidecar(self) -> Path:
        return self.folder / f"part-{self.index:05d}.json"

    @property
    def parquet(self) -> Path:
        return self.sidecar.with_suffix(".parquet")

    @property
    def tries(self) -> Path:
        """Where a task notes what it reads, for the task that repeats it; left behind, it goes as any file aside."""
        return self.folder / f".part-{self.index:05d}.tries.aside"


@dataclass(frozen=True)
class PartReport:
    """What the sidecar says of a finished part."""

    file: dict[str, Any] | None
    """Name, rows, bytes, sha256; None where every item was refused."""
    entries: tuple[SeriesEntry, ...]
    rejects: tuple[Reject, ...]

    @property
    def rows(self) -> int:
        return sum(entry.num_rows for entry in self.entries)


def prepare_part(part: Part, *, repeated: bool = False) -> tuple[int, int]:
    """Write the Parquet file, then the sidecar; returns the number of rows and of rejects.

    Args:
        repeated: whoever runs this repeats it when its process ends; an item that ends it ``MAX_TRIES`` times is
            refused.
    """
    part.sidecar.unlink(missing_ok=True)
    if part.tries.exists():
        _remove_left_over(part)
    rejects: list[Reject] = []
    with PartWriter(part.parquet) as writer:
        for place, (item, split) in enumerate(zip(part.items, part.splits, strict=True)):
            if repeated and not _may_try(part, place):
                detail = f"reading it ended its process {MAX_TRIES} times: a crash, too little memory, or a hang"
                rows, warnings, refused = [], (), [(item.key, Refusal("READER_CRASHED", detail))]
            else:
                rows, warnings, refused = _load_rows(item, split, part, repeated)
            rejects += (Reject(hashed_id(key, part.origin.id_key), it.reason, it.detail) for key, it in refused)
            if rows:
                writer.append(rows, warnings)
            del rows  # the next volume need not lie beside this one
    if writer.file is None:
        part.parquet.unlink(missing_ok=True)
    content = {
        "file": writer.file and asdict(writer.file),
        "series": [entry_as_dict(entry) for entry in writer.entries],
        "rejects": [asdict(reject) for reject in rejects],
    }
    write_aside(part.sidecar, json_text(content | {"digest": _digest(content)}))
    part.tries.unlink(missing_ok=True)
    return sum(entry.num_rows for entry in writer.entries), len(rejects)


def _remove_left_over(part: Part) -> None:
    """What a process that ended had begun to write."""
    for left_over in part.folder.glob(f".{part.sidecar.stem}.*.aside"):
        if left_over != part.tries:
            left_over.unlink(missing_ok=True)


def _may_try(part: Part, place: int) -> bool:
    """Note that the item at this place is read now; False where that was the end of too many processes."""
    try:
        tries = {int(at): int(count) for at, count in json.loads(part.tries.read_bytes()).items()}
    except (OSError, ValueError, AttributeError):
        tries = {}
    # those before this place were read this time, but for the ones that are not tried any more
    tries = {at: count for at, count in tries.items() if at >= place or count > MAX_TRIES}
    tries[place] = min(tries.get(place, 0), MAX_TRIES) + 1
    part.tries.write_text(json.dumps(tries))
    return tries[place] <= MAX_TRIES


def finished(part: Part) -> PartReport | None:
    """The report of a complete part: its sidecar is what was written, its Parquet file has the size and, by its footer,
    the rows that stand there."""
    try:
        content = json.loads(part.sidecar.read_bytes())
        if content.pop("digest") != _digest(content):
            return None
        file = content["file"]
        if file and (part.parquet.stat().st_size != file["bytes"] or count_rows(part.parquet) != file["rows"]):
            return None
        return PartReport(
            file=file,
            entries=tuple(entry_from_dict(entry) for entry in content["series"]),
            rejects=tuple(Reject(**reject) for reject in content["rejects"]),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, DataError):
        return None  # not there, or damaged: it is simply written again


def _digest(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def run_here(parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """Rows and rejects of part after part, in this process."""
    return map(prepare_part, parts)


def run_on_ray(parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """The same as Ray Data tasks, one CPU each; Ray, already initialised, repeats those whose process ends."""
    if not parts:
        return
    import ray.data

    quiet_ray_data()
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # the caller tells the progress, in rows and rejects
    with _prompt_scheduling(), ray.data.DataContext.current(context):
        rows = ray.data.range(len(parts), override_num_blocks=len(parts))
        reports = rows.map(_PreparePart(parts), num_cpus=1)
        for report in reports.iter_rows():
            if report["errno"]:
                raise OSError(report["errno"], os.strerror(report["errno"]))
            yield report["rows"], report["rejects"]


@contextmanager
def _prompt_scheduling() -> Iterator[None]:
    """Ray Data learns after a second which CPUs there are, and looks every tenth of a second which tasks have ended;
    many a series is read in less. Its names for these times are not public: where they go, it is only slower."""
    with ExitStack() as stack:
        with suppress(ImportError):
            from ray.data._internal.execution import resource_manager, streaming_executor_state

            for owner, name, seconds in (
                (resource_manager.ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", 0.1),
                (streaming_executor_state, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S", 0.04),
            ):
                if hasattr(owner, name):
                    stack.callback(setattr, owner, name, getattr(owner, name))
                    setattr(owner, name, seconds)
        yield


def quiet_ray_data() -> None:
    """Ray Data, already imported, keeps its plans and its remark on progress bars to its log files."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


class _PreparePart:
    """What a task does; it travels to each process once, as Ray sends functions. The parts lie in Ray's store."""

    def __init__(self, parts: Sequence[Part]) -> None:
        import ray

        self.parts = [ray.put(part) for part in parts]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Rows, rejects, and the ``errno`` of a folder that cannot be written, else 0: Ray would wrap the error, and
        print where it was."""
        import ray

        try:
            rows, rejects = prepare_part(ray.get(self.parts[row["id"]]), repeated=True)
        except OSError as error:
            if not (is_disk_full(error) or is_not_writable(error)):
                raise
            return {"rows": 0, "rejects": 0, "errno": error.errno}
        return {"rows": rows, "rejects": rejects, "errno": 0}


def _load_rows(item: Item, split: str, part: Part, repeated: bool) -> tuple[list[Row], Sequence[str], Refused]:
    """Rows, warnings and refusals of one item, whatever its reader does; only for a full disk no item is to blame."""
    origin = part.origin
    try:
        with time_limit(part.timeout_s, end_process=repeated):
            loaded = item.load()
            if isinstance(loaded, CTSeries):
                return series_rows(loaded, split, origin), loaded.warnings, ()
            return picture_rows(loaded.pictures, split, origin), loaded.warnings, loaded.refused
    except Refusal as refusal:
        return [], (), [(item.key, refusal)]
    except Overdue:
        detail = f"reading it took more than {part.timeout_s:g} s: a disk that does not answer, or a file without end"
        return [], (), [(item.key, Refusal("READER_OVERDUE", detail))]
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a reader may call sys.exit, and the panics of some libraries are no Exception
        if is_disk_full(error) or _stops_the_run(error):
            raise
        # A reader, perhaps not ours, on strangers' files: one series must not stop the thousands after it. Its message
        # is not kept, for it may name the patient; the place in the code is enough to find the defect.
        place = extract_tb(error.__traceback__)[-1]
        detail = f"{type(error).__name__} in {place.name} ({Path(place.filename).name} line {place.lineno})"
        return [], (), [(item.key, Refusal("READER_FAILED", detail))]


def _stops_the_run(error: BaseException) -> bool:
    """Ray turns the signal that ends a process into SystemExit, wherever the process is; no item is to blame."""
    return isinstance(error, SystemExit) and (hasattr(error, "ray_terminate_msg") or error.code == signal.SIGTERM)
