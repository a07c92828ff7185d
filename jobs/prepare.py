"""Read a data set and write it as shards, on Ray Data.

    python jobs/prepare.py --out shards/deeplesion deeplesion --root DeepLesion
    ray job submit --working-dir . -- python jobs/prepare.py --out /mnt/shards/ct dicom --root /mnt/ct

A run that was stopped goes on when the same command is given again. What cannot be used is refused with a reason, and
named in OUT-private/sources.json and, where the output is a terminal, there; neither shards nor logs hold names.

With --report the data passport is written beside the shards, passport.html and passport.json: what they hold, and
whether anything is in two splits, theirs or those of the shards that --compare names. The exit code is 3 then.
"""

import difflib
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, Union

import tyro

from mp3d import cli
from mp3d.data import READERS
from mp3d.data.id_key import id_key_path, load_id_key
from mp3d.data.part import ITEM_TIMEOUT_S
from mp3d.data.prepare import PrepareResult, prepare
from mp3d.data.source import Source
from mp3d.data.splits import SPLITS, SplitFractions, assign_splits
from mp3d.errors import ConfigError, DataError
from mp3d.launch import connect_ray

TOO_MANY_REJECTS = 5
"""Exit code."""
SHOWN_REJECTS = 20
PROGRESS_EVERY_S = 10.0
"""Between two lines of progress where the output is no terminal."""


@dataclass(frozen=True)
class Options:
    """How a data set is prepared; what it is comes behind, as a sub-command."""

    out: Path
    """Folder of the shards: a new one, or one that the same command began. On a cluster all nodes must mount it."""
    runner: Literal["ray", "local"] = "ray"
    """ray: tasks on the cluster (or this machine); local: one after the other in this process."""
    items_per_part: int = 1
    """Series (or batches of pictures) in one Parquet file."""
    split_fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Shares of the patients in train, val and test, where the data set gives no split."""
    split_seed: int = 0
    """Another number, another draw of the patients."""
    id_key_file: Path | None = None
    """Secret that patients are hashed with; default: $MP3D_ID_KEY_FILE, else ~/.config/mp3d/id_key; made if absent."""
    allowed_rejects: int = 0
    """Series or pictures that may be refused before the exit code is 5."""
    retry_rejects: bool = False
    """Read once more what was refused by an earlier run of this command."""
    item_timeout_s: float = ITEM_TIMEOUT_S
    """Seconds by the clock after which a series that is still being read is refused."""
    report: bool = False
    """Read the shards back and write their data passport: counts, hashes, leaks, spacing, HU, boxes, anchors."""
    compare: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """With --report: other shards, such as those of the pre-training, that must share no patient; may be repeated."""
    dry_run: bool = False
    """List the data set, print the plan and stop."""


def main(argv: Sequence[str] | None = None) -> int:
    options, read = parse(sys.argv[1:] if argv is None else argv)
    out = _absolute(options.out)
    if options.compare and not options.report:
        raise ConfigError("--compare looks for leaks in the data passport; give --report too")
    arguments = {name: _absolute(value) for name, value in read.keywords.items()}
    print("listing the data set ...")
    source = read.func(**arguments)
    splits = assign_splits(source.items, options.split_fractions, options.split_seed)
    if options.dry_run:
        cli.print_plan(plan(source, splits, options, out))
        return 0
    id_key = load_id_key(options.id_key_file and _absolute(options.id_key_file))
    if options.runner == "ray":
        connect_ray()
    result = prepare(
        source,
        out,
        id_key=id_key,
        runner=options.runner,
        items_per_part=options.items_per_part,
        split_fractions=options.split_fractions,
        split_seed=options.split_seed,
        retry_rejects=options.retry_rejects,
        item_timeout_s=options.item_timeout_s,
        progress=Progress(),
    )
    print_result(result, source)
    print_empty_splits(result, source, splits, options.split_fractions)
    if options.report:
        report(out, [_absolute(other) for other in options.compare])
    elif not result.already_prepared:
        for outdated in out.glob("passport.*"):
            outdated.unlink()
    if len(result.rejects) > options.allowed_rejects:
        told = f"{len(result.rejects)} were refused, --allowed-rejects is {options.allowed_rejects}"
        print(f"error: {told}", file=sys.stderr)
        return TOO_MANY_REJECTS
    return 0


def parse(argv: Sequence[str]) -> tuple[Options, functools.partial[Source]]:
    """The options, and the reader with its arguments, not yet called.

    Usage errors exit with 2, as ``--help`` does with 0.

    Raises:
        ConfigError: no such reader; the message has the nearest name.
    """
    if not set(argv) & READERS.keys():
        for word in argv:
            if near := difflib.get_close_matches(word, READERS, n=1):
                raise ConfigError(f"there is no reader {word!r}; did you mean {near[0]!r}? all: {', '.join(READERS)}")
    commands = tuple(
        Annotated[
            functools.partial,
            tyro.conf.subcommand(name, constructor=_deferred(resolve_name(place)), prefix_name=False),
        ]
        for name, place in READERS.items()
    )

    def command(
        options: Annotated[Options, tyro.conf.arg(name="")],
        reader: Annotated[Union[commands], tyro.conf.arg(name="")],  # type: ignore[valid-type]  # noqa: UP007
    ) -> tuple[Options, functools.partial[Source]]:
        return options, reader

    return tyro.cli(
        command,
        args=list(argv),
        prog=Path(sys.argv[0]).name,
        description=f"{__doc__}\n{cli.EXIT_CODES}",
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.CascadeSubcommandArgs),
    )


def plan(source: Source, splits: dict[str, str], options: Options, out: Path) -> dict[str, Any]:
    """What would be done, in words."""
    patients = Counter(splits.values())
    pictures = Counter[str]()
    for item in source.items:
        pictures[splits[item.patient]] += len(item.members)
    in_split = pictures if source.items and source.items[0].members else patients
    unit = "pictures" if in_split is pictures else "patients"
    num_parts = -(-len(source.items) // options.items_per_part)
    refused = Counter(refusal.reason for _, refusal in source.refused)
    return {
        "data set": f"{source.dataset}, read by {source.reader}",
        "items": f"{len(source.items)} {'batches of pictures' if unit == 'pictures' else 'series'}",
        "splits": ", ".join(f"{split} {in_split[split]} {unit}" for split in SPLITS),
        "classes": f"{len(source.class_names)}: {', '.join(source.class_names[:5])}"
        + (" ..." if len(source.class_names) > 5 else ""),
        "refused": ", ".join(f"{reason} {count}" for reason, count in refused.most_common()) or "none so far",
        "notes": "; ".join(source.notes) or "none",
        "writes": f"{num_parts} parts into {out}{' (exists)' if out.exists() else ''}",
        "id key": id_key_path(options.id_key_file),
        "runs on": options.runner,
    }


def print_result(result: PrepareResult, source: Source) -> None:
    print(f"{'already prepared, nothing to do' if result.already_prepared else 'prepared'}: {result.folder}")
    print(f"{'':8}{'patients':>10}{'series':>10}{'rows':>10}{'boxes':>10}")
    for split, counts in result.counts.items():
        print(f"{split:8}{counts['patients']:>10}{counts['series']:>10}{counts['rows']:>10}{counts['boxes']:>10}")
    for note in source.notes:
        print(f"note: {note}")
    for warning, count in result.warnings.items():
        print(f"tolerated: {warning} in {count} series")
    for key, reject in result.rejects[:SHOWN_REJECTS]:
        # A log is kept and passed on, and names of files may be names of patients; they may also be no valid text.
        name = key.encode(errors="backslashreplace").decode() if sys.stdout.isatty() else reject.source
        print(f"refused: {name}: {reject.reason}: {reject.detail}")
    if len(result.rejects) > SHOWN_REJECTS:
        print(f"refused: {len(result.rejects) - SHOWN_REJECTS} more; reasons are in manifest.json")
    if result.private:
        print(f"names of all that was refused: {result.private}")


def print_empty_splits(
    result: PrepareResult, source: Source, splits: Mapping[str, str], fractions: SplitFractions
) -> None:
    """A note on the splits that were to get a share of the patients and hold none."""
    drawn = {item.patient for item in source.items if item.split is None}
    empty = [split for split, share in zip(SPLITS, fractions, strict=True) if share > 0 and split not in result.counts]
    if not (drawn and empty):
        return
    unit = "picture" if source.items[0].members else "patient"
    refused = [split for split in empty if split in splits.values()]
    missed = [split for split in empty if split not in refused]
    if refused:
        print(f"note: {' and '.join(refused)} stayed empty: every {unit} that fell into it was refused")
    if missed:
        told = f"only 1 {unit} is" if len(drawn) == 1 else f"only {len(drawn)} {unit}s are"
        advice = "see the column split of the readers in README.md, or give other --split-fractions"
        print(f"note: no {unit} fell into {' and '.join(missed)}: {told} told apart; {advice}")


def report(out: Path, compare: Sequence[Path]) -> None:
    """Write the data passport.

    Raises:
        DataError: something is in two splits, or data sets cannot be compared; the passport stands then.
    """
    from mp3d.report import write_passport

    print("reading the shards for their passport ...")
    passport = write_passport(out, compare)
    print(f"data passport: {passport.html}")
    print_anchors(json.loads(passport.json.read_bytes())["anchors"])
    if passport.leaks:
        raise DataError(f"leak: {'; '.join(passport.leaks)}; {passport.html} names them")
    if passport.not_compared:
        raise DataError(
            f"patients cannot be compared with {'; '.join(passport.not_compared)}; prepare both with one --id-key-file"
        )


def print_anchors(table: dict[str, Any] | None) -> None:
    """How well published and fitted anchors meet the boxes of val, or of the first split that has any."""
    if table is None:
        return
    split = table["shown_split"]
    count = table["sets"][0]["splits"][split]["boxes"]
    print(f"{f'anchors, {count} boxes of {split}':34}{'centred':>8}{'>= 0.5':>8}{'>= 0.7':>8}", end="")
    print(f"{'on grid':>9}{'>= 0.5':>8}{'>= 0.7':>8}")
    for anchors in table["sets"]:
        of = anchors["splits"][split]
        shares = [of[place][what] for place in ("centred", "placed") for what in ("mean_iou", "at_50", "at_70")]
        print(f"{anchors['name']:34}" + "".join(f"{share:>{9 if i == 3 else 8}.3f}" for i, share in enumerate(shares)))


class Progress:
    """One line that is rewritten on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._already_done: int | None = None
        self._told = -PROGRESS_EVERY_S

    def __call__(self, done: int, total: int, rows: int, rejects: int) -> None:
        if self._already_done is None:
            self._already_done = done
        passed = time.monotonic() - self._started
        on_terminal = sys.stdout.isatty()
        if not on_terminal and done < total and passed - self._told < PROGRESS_EVERY_S:
            return
        self._told = passed
        new = done - self._already_done
        eta = f", {passed / new * (total - done):.0f} s left" if new and done < total else ""
        line = f"{done}/{total} parts, {rows} rows, {rejects} refused, {passed:.0f} s{eta}"
        if on_terminal:
            print(f"\r\033[K{line}", end="\n" if done == total else "", flush=True)
        else:
            print(line, flush=True)


def _deferred(reader: Callable[..., Source]) -> Callable[..., functools.partial[Source]]:
    """The reader's signature and help, without reading: what goes wrong while reading is no usage error."""

    @tyro.conf.configure(tyro.conf.FlagConversionOff)
    @functools.wraps(reader)
    def bind(**arguments: Any) -> functools.partial[Source]:
        return functools.partial(reader, **arguments)

    return bind


def _absolute(value: Any) -> Any:
    """Paths as every worker can open them."""
    return Path(cli.absolute(str(value))) if isinstance(value, Path) else value


if __name__ == "__main__":
    sys.exit(cli.run(main))
