"""A listed data set to shards: one task per part, under Ray Data or in a plain loop, with the same bytes either way.

Every file is a pure function of the items, the id key and the options: a run that was killed goes on when it is started
again, and ends with the very files of one that was not. A part is complete when its sidecar stands, the data set when
its manifest stands.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mp3d.data.part import ITEM_TIMEOUT_S, Part, PartReport, finished, run_here, run_on_ray
from mp3d.data.plan import claim, make_plan
from mp3d.data.shard import (
    MANIFEST,
    Origin,
    Reject,
    SeriesEntry,
    entry_as_dict,
    hashed_id,
    is_disk_full,
    is_not_writable,
    json_text,
    manifest_text,
    write_aside,
    write_manifest,
)
from mp3d.data.source import Source
from mp3d.data.splits import SPLITS, SplitFractions, assign_splits
from mp3d.errors import ConfigError, DataError, ResourceError

SOURCES = "sources.json"
MAX_TIMEOUT_S = 1e6

Progress = Callable[[int, int, int, int], None]
"""Called with parts done, parts in all, rows written and rejects, each including what an earlier run did."""


@dataclass(frozen=True)
class PrepareResult:
    """What stands in the folder now.

    Attributes:
        folder: the data set.
        counts: patients, series, rows and boxes of each split; a picture is a patient and a series of its own.
        warnings: what was tolerated, and in how many series.
        rejects: what was refused, each with its key relative to the root.
        private: file outside the data set that holds those keys, readable by its owner only; None without rejects.
        already_prepared: nothing had to be written.
    """

    folder: Path
    counts: dict[str, dict[str, int]]
    warnings: dict[str, int]
    rejects: tuple[tuple[str, Reject], ...]
    private: Path | None
    already_prepared: bool


def prepare(
    source: Source,
    out: Path,
    *,
    id_key: bytes,
    runner: Literal["ray", "local"],
    items_per_part: int = 1,
    split_fractions: SplitFractions = (0.7, 0.15, 0.15),
    split_seed: int = 0,
    retry_rejects: bool = False,
    item_timeout_s: float = ITEM_TIMEOUT_S,
    progress: Progress | None = None,
) -> PrepareResult:
    """Write a data set into a folder of its own, or finish what was begun there.

    The files under the root are taken to be the same in all runs into one folder. What was refused is named only in
    ``<out>-private/sources.json``; the data set itself holds no name.

    Args:
        source: the listed data set.
        out: the folder, made if it is not there; on a cluster one that all nodes mount.
        id_key: see :func:`mp3d.data.id_key.load_id_key`.
        runner: ``ray``: tasks of the Ray that is already initialised; ``local``: this process.
        items_per_part: series (or batches of pictures) in one Parquet file.
        split_fractions: see :func:`mp3d.data.splits.assign_splits`.
        split_seed: another number, another draw.
        retry_rejects: do the parts with rejects once more, after what was wrong (a disk, a permission) was mended.
        item_timeout_s: an item that takes longer to be read is refused.
        progress: called once at the start and once for each finished part.

    Raises:
        ConfigError: wrong options, or a folder that holds something else, was begun with another plan, or is being
            prepared.
        DataError: nothing to prepare or nothing usable, or one patient in two splits.
        ResourceError: the disk is full, or the folder can no longer be written; what was finished stands.
    """
    out = out.absolute()
    splits = assign_splits(source.items, split_fractions, split_seed)
    parts = _parts(source, splits, out, id_key, items_per_part, item_timeout_s)
    rule = {"items_per_part": items_per_part, "split_fractions": list(split_fractions), "split_seed": split_seed}
    plan = make_plan(source, id_key, rule)
    with room_on_disk(out), claim(out, plan):
        reports = {part.index: report for part in parts if (report := finished(part))}
        if retry_rejects:
            reports = {index: report for index, report in reports.items() if not report.rejects}
        todo = [part for part in parts if part.index not in reports]
        if todo:
            (out / MANIFEST).unlink(missing_ok=True)
        _run(todo, reports, run_on_ray if runner == "ray" else run_here, len(source.refused), progress)
        in_order = [reports[part.index] for part in parts]
        entries = [entry for report in in_order for entry in report.entries]
        refused = [Reject(hashed_id(key, id_key), refusal.reason, refusal.detail) for key, refusal in source.refused]
        rejects = refused + [reject for report in in_order for reject in report.rejects]
        named = _name(rejects, source, id_key)
        private = _write_private(out, named)
        if not entries:
            reasons = Counter(reject.reason for reject in rejects).most_common()
            told = ", ".join(f"{reason} {count}" for reason, count in reasons)
            first = rejects[0]  # its name stays in the private file: the message goes into logs
            raise DataError(
                f"nothing could be used, all {len(rejects)} were refused ({told}); the first is {first.source}: "
                f"{first.reason}: {first.detail}; {private} has the names"
            )
        _check_patients(entries)
        content = {
            **{name: value for name, value in plan.items() if name != "items"},
            "notes": list(source.notes),
            "official_splits": sum(item.split is not None for item in source.items),
            "counts": _count(entries),
            "files": [report.file for report in in_order if report.file],
            "series": [entry_as_dict(entry) for entry in entries],
            "rejects": [asdict(reject) for reject in rejects],
        }
        already_prepared = not todo and _holds(out / MANIFEST, manifest_text(content))
        if not already_prepared:
            write_manifest(out, content)
    return PrepareResult(
        folder=out,
        counts=content["counts"],
        warnings=dict(sorted(Counter(warning for entry in entries for warning in entry.warnings).items())),
        rejects=tuple(named),
        private=private,
        already_prepared=already_prepared,
    )


@contextmanager
def room_on_disk(out: Path) -> Iterator[None]:
    """Every file is written aside and then renamed, so a full disk leaves whole files or none."""
    try:
        yield
    except OSError as error:
        if is_not_writable(error):
            detail = f"{out}, or what belongs beside it, cannot be written ({os.strerror(error.errno or 0)})"
            raise ResourceError(f"{detail}; mend that, then give the same command again: it goes on") from error
        if not is_disk_full(error):
            raise
        detail = f"no room is left to write into {out} or beside it ({os.strerror(error.errno or 0)})"
        raise ResourceError(f"{detail}; free some, then give the same command again: it goes on") from error


def _parts(
    source: Source, splits: dict[str, str], out: Path, id_key: bytes, items_per_part: int, item_timeout_s: float
) -> list[Part]:
    if items_per_part < 1:
        raise ConfigError(f"items_per_part is {items_per_part}; a part holds at least one")
    if not 0 < item_timeout_s < MAX_TIMEOUT_S:  # also NaN
        raise ConfigError(f"item_timeout_s is {item_timeout_s:g}; it must be above 0 and below {MAX_TIMEOUT_S:g}")
    if not source.items and not source.refused:
        raise DataError(f"{source.reader} found nothing to read; check --root")
    for key, times in Counter(item.key for item in source.items).items():
        if times > 1:
            raise DataError(f"{source.reader} lists {hashed_id(key, id_key)} {times} times; a key must be unique")
    origin = Origin(source.dataset, source.reader, id_key)
    groups = [source.items[start : start + items_per_part] for start in range(0, len(source.items), items_per_part)]
    return [
        Part(index, items, tuple(splits[item.patient] for item in items), out, origin, item_timeout_s)
        for index, items in enumerate(groups)
    ]


def _run(
    todo: Sequence[Part],
    reports: dict[int, PartReport],
    runner: Callable[[Sequence[Part]], Iterator[tuple[int, int]]],
    refused: int,
    progress: Progress | None,
) -> None:
    """Do what is to be done, and complete ``reports`` with what then stands on the disk."""
    done, total = len(reports), len(reports) + len(todo)
    rows = sum(report.rows for report in reports.values())
    rejects = refused + sum(len(report.rejects) for report in reports.values())
    if progress:
        progress(done, total, rows, rejects)
    for new_rows, new_rejects in runner(todo):
        done, rows, rejects = done + 1, rows + new_rows, rejects + new_rejects
        if progress:
            progress(done, total, rows, rejects)
    for part in todo:
        report = finished(part)
        if report is None:
            raise DataError(f"{part.parquet} is not as it was just written; do all nodes mount the folder?")
        reports[part.index] = report
    standing = sum(report.rows for report in reports.values())
    if (done, rows) != (len(reports), standing):  # Ray Data is known to lose rows in silence
        told = f"tasks told of {done} parts with {rows} rows, {len(reports)} with {standing} stand on the disk"
        raise DataError(f"{told}; prepare into a new folder, and report this")


def _name(rejects: Sequence[Reject], source: Source, id_key: bytes) -> list[tuple[str, Reject]]:
    """The rejects with their keys, which the shards do not know."""
    if not rejects:
        return []
    keys = [key for key, _ in source.refused] + [key for item in source.items for key in (item.key, *item.members)]
    names = {hashed_id(key, id_key): key for key in keys}
    return [(names.get(reject.source, reject.source), reject) for reject in rejects]


def _write_private(out: Path, named: Sequence[tuple[str, Reject]]) -> Path | None:
    path = out.with_name(f"{out.name}-private") / SOURCES
    if not named:
        path.unlink(missing_ok=True)
        return None
    path.parent.mkdir(mode=0o700, exist_ok=True)
    content = {reject.source: key for key, reject in named}
    return write_aside(path, json_text(content), mode=0o600)


def _check_patients(entries: Sequence[SeriesEntry]) -> None:
    """The splits once more, by what the files themselves say of their patients."""
    splits: dict[str, str] = {}
    for entry in entries:
        if splits.setdefault(entry.patient, entry.split) != entry.split:
            raise DataError(
                f"patient {entry.patient} is in {splits[entry.patient]} and in {entry.split}: "
                "the reader listed one patient as two"
            )


def _count(entries: Sequence[SeriesEntry]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        chosen = [entry for entry in entries if entry.split == split]
        if chosen:
            pictures = sum(entry.num_rows for entry in chosen if entry.spacing_mm is None)
            series = [entry for entry in chosen if entry.spacing_mm is not None]
            counts[split] = {
                "patients": pictures + len({entry.patient for entry in series}),
                "series": pictures + len(series),
                "rows": sum(entry.num_rows for entry in chosen),
                "boxes": sum(count or 0 for entry in chosen for count in entry.boxes_per_row or ()),
            }
    return counts


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except (OSError, UnicodeDecodeError):
        return False
