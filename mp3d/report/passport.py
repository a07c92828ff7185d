"""The data passport: what prepared shards hold, checked, as JSON for programs and as one HTML page for people.

    <shards>/passport.json  passport.html

Both follow from the shards alone (and those they are compared with): the same shards, the same passport. Patients and
series stand there as the keyed hashes of the shards; file names are not known here.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np

from mp3d.config import ClipConfig
from mp3d.data.intensity import sample_intensities
from mp3d.data.leaks import id_key_fingerprint, shared_between, shared_within, traces
from mp3d.data.prepare import room_on_disk
from mp3d.data.reasons import REASONS, WARNINGS
from mp3d.data.shard import MANIFEST, ShardSet, count_rows, json_text, open_shards, write_aside
from mp3d.data.survey import SplitSurvey, survey
from mp3d.errors import DataError
from mp3d.models.anchor_fit import PUBLISHED, fit_anchors
from mp3d.report import passport_numbers as numbers
from mp3d.report.html import data_url, template
from mp3d.report.passport_figures import draw_anchors, draw_boxes, draw_geometry, draw_intensities

PASSPORT_JSON = "passport.json"
PASSPORT_HTML = "passport.html"
FORMAT_VERSION = 1
SAMPLED_ROWS = 200
"""Slices (or pictures) of each split whose pixels are counted."""
ANCHOR_IMAGE_SIZE = ClipConfig().image_size
"""Pixels of the longer side at which anchors meet the boxes."""
FITTED = "fitted to train"
FITTED_FROM = "two sizes an octave"
TOLD_OF_MANIFEST = (
    *("dataset", "reader", "reader_options", "class_names", "format_version", "num_items", "items_per_part"),
    *("split_fractions", "split_seed", "official_splits", "notes"),
)
PRIVATE = 0o600
"""Permissions of the files: for the owner."""


@dataclass(frozen=True)
class Passport:
    """A written passport.

    Attributes:
        json: the file for programs.
        html: the file for people.
        leaks: what is in two splits and must not be, a line each.
        not_compared: data sets whose ids could not be compared, a line each.
    """

    json: Path
    html: Path
    leaks: tuple[str, ...]
    not_compared: tuple[str, ...]


def write_passport(folder: Path, compare: Sequence[Path] = ()) -> Passport:
    """Check prepared shards, look for what they share with others, and write both files beside them.

    Every file is read: once for its hash, once more for what the passport tells of it.

    Args:
        folder: of the shards.
        compare: folders of other shards, such as those of the pre-training.

    Raises:
        DataError: shards that are not there, or not as they were written; nothing is written then.
        ResourceError: the disk is full.
    """
    shards = open_shards(folder)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    _check_files(shards, manifest["files"])
    surveys = survey(shards)
    intensities = {split: sample_intensities(shards, split, SAMPLED_ROWS) for split in surveys}
    with_boxes = {split: of for split, of in surveys.items() if len(of.boxes)}
    anchors, anchors_png = _anchors(with_boxes)
    content = {
        "passport_version": FORMAT_VERSION,
        "data_set": {name: manifest.get(name) for name in TOLD_OF_MANIFEST},
        "digests": {"manifest": shards.digest, "id_key": manifest.get("id_key"), "files": manifest["files"]},
        "splits": {split: numbers.count_split(of, shards.class_names) for split, of in surveys.items()},
        "rejects": numbers.rejected(shards.rejects),
        "tolerated": _tolerated(shards),
        "leaks": _leaks(shards, surveys, [open_shards(other) for other in compare]),
        "geometry": {split: numbers.geometry(of) for split, of in surveys.items()},
        "intensities": {split: numbers.intensity(of) for split, of in intensities.items()},
        "boxes": {split: numbers.boxes(of) for split, of in with_boxes.items()},
        "anchors": anchors,
    }
    is_ct = any(len(of.spacing_mm) for of in surveys.values())
    figures = {
        "geometry": draw_geometry(surveys) if is_ct else None,
        "intensities": draw_intensities(intensities),
        "boxes": _draw_boxes(with_boxes, in_mm=is_ct) if with_boxes else None,
        "anchors": anchors_png,
    }
    page = template("passport.html.j2").render(
        **content,
        is_ct=is_ct,
        meanings=REASONS | WARNINGS,
        figures={name: png and data_url(png) for name, png in figures.items()},
    )
    with room_on_disk(folder):
        written = (
            write_aside(folder / PASSPORT_JSON, json_text(content), mode=PRIVATE),
            write_aside(folder / PASSPORT_HTML, page, mode=PRIVATE),
        )
    return Passport(
        *written,
        leaks=tuple(_leak_lines(content["leaks"])),
        not_compared=tuple(
            f"{other['data_set']}: {other['ids_not_compared']}"
            for other in content["leaks"]["between"]
            if other["ids_not_compared"]
        ),
    )


def _check_files(shards: ShardSet, files: Sequence[Mapping[str, Any]]) -> None:
    rows = Counter[str]()
    for entry in shards.entries:
        rows[entry.file] += entry.num_rows
    for of in files:
        path = shards.folder / of["name"]
        try:
            with path.open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}; run jobs/prepare.py again") from error
        if digest != of["sha256"] or not rows[of["name"]] == of["rows"] == count_rows(path):
            raise DataError(f"{path} is not what was written; delete the file and run jobs/prepare.py again")


def _leaks(shards: ShardSet, surveys: Mapping[str, SplitSurvey], others: Sequence[ShardSet]) -> dict[str, Any]:
    mine, key = traces(shards, surveys), id_key_fingerprint(shards)
    between = []
    for other in others:
        theirs, their_key = traces(other, survey(other)), id_key_fingerprint(other)
        same_key = key is not None and key == their_key
        reason = None
        if "patients" in mine and "patients" in theirs and not same_key:
            reason = "prepared with another id key" if key and their_key else "a manifest without the id key's print"
        between.append(
            {
                "data_set": other.dataset,
                "manifest": other.digest,
                "same_key": same_key,
                "ids_not_compared": reason,
                "shared": numbers.shared(shared_between(mine, theirs, same_key=same_key)),
            }
        )
    within = numbers.shared(shared_within(mine))
    everything = within + [each for other in between for each in other["shared"]]
    return {"found": any(each["is_leak"] for each in everything), "within": within, "between": between}


def _leak_lines(leaks: Mapping[str, Any]) -> list[str]:
    return [
        f"{each['kind']} of {each['split']} that are also in {each['other_split']}{where}: {each['count']}"
        for where, found in [("", leaks["within"])]
        + [(f" of {other['data_set']} {other['manifest'][:8]}", other["shared"]) for other in leaks["between"]]
        for each in found
        if each["is_leak"]
    ]


def _tolerated(shards: ShardSet) -> dict[str, int]:
    """What was tolerated, and in how many series."""
    return dict(sorted(Counter(code for entry in shards.entries for code in entry.warnings).items()))


def _anchors(surveys: Mapping[str, SplitSurvey]) -> tuple[dict[str, Any] | None, bytes | None]:
    """The table of anchors, and its picture over val (else over the first split that has boxes)."""
    if not surveys:
        return None, None
    widths_heights = {split: of.boxes.widths_heights_at(ANCHOR_IMAGE_SIZE) for split, of in surveys.items()}
    sets = dict(PUBLISHED)
    if "train" in widths_heights:
        sets[FITTED] = fit_anchors(widths_heights["train"], PUBLISHED[FITTED_FROM])
    rows, centred, placed = numbers.anchor_table(sets, widths_heights)
    shown = "val" if "val" in widths_heights else next(iter(widths_heights))
    means = {split: {name: iou.mean() for name, iou in of.items()} for split, of in placed.items()}
    table = {
        "image_size_px": ANCHOR_IMAGE_SIZE,
        "shown_split": shown,
        "fitted": FITTED if FITTED in sets else None,
        "fitted_is_worse_on": [split for split, of in means.items() if FITTED in of and of[FITTED] < of[FITTED_FROM]],
        "sets": rows,
    }
    return table, draw_anchors(centred[shown], placed[shown], emphasised=FITTED)


def _draw_boxes(surveys: Mapping[str, SplitSurvey], *, in_mm: bool) -> bytes:
    sizes, ratios = {}, {}
    for split, of in surveys.items():
        scaled = of.boxes.widths_heights_mm if in_mm else of.boxes.widths_heights
        sizes[split] = np.sqrt(scaled.prod(axis=1))
        ratios[split] = of.boxes.widths_heights[:, 1] / of.boxes.widths_heights[:, 0]
    return draw_boxes(sizes, ratios, "mm" if in_mm else "pixels")
