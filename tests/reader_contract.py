"""What every reader must keep to (``mp3d/data/source.py``), whatever its data set."""

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mp3d.data.prepare import prepare
from mp3d.data.reasons import REASONS, WARNINGS
from mp3d.data.series import CTSeries, Picture, Truth
from mp3d.data.shard import SCHEMA, Row, ShardSet, decode_image, decode_truth, hashed_id, open_shards, row_is_intact
from mp3d.data.source import Item, PictureBatch, Source
from mp3d.data.splits import SPLITS
from mp3d.errors import Refusal
from tests.reader_worlds import World
from tests.tiny import ID_KEY

Loaded = CTSeries | PictureBatch


def check_reader(read: Callable[..., Source], world: World, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a world under ``root`` and prepare it twice, into folders beside it."""
    monkeypatch.chdir(root)
    paths = {name: value.relative_to(root) for name, value in world.arguments.items() if isinstance(value, Path)}
    source = read(**world.arguments | paths)
    monkeypatch.chdir("/")  # items must not depend on the working folder
    again = read(**world.arguments)
    check_source(source, root)
    assert [item_identity(item) for item in again.items] == [item_identity(item) for item in source.items]
    assert (again.options, again.notes, again.class_names) == (source.options, source.notes, source.class_names)
    loaded, refused = load_all(source)
    assert sorted(refused) == sorted(world.refused)
    for one in loaded:
        check_loaded(one, source)
    shards = root.with_name("shards")
    result = prepare(source, shards, id_key=ID_KEY, runner="local", items_per_part=2)
    assert sorted(reject.reason for _, reject in result.rejects) == sorted(world.refused)
    rows = check_rows(open_shards(shards), loaded, source)
    assert Counter(None if row["boxes"] is None else len(row["boxes"]) // 4 for row in rows) == world.boxes
    assert sum(row["mask"] is not None for row in rows) == world.num_masks
    check_files(shards, source, loaded)
    prepare(again, root.with_name("again"), id_key=ID_KEY, runner="local", items_per_part=2)
    assert contents(shards) == contents(root.with_name("again")), "preparing once more gives other bytes"


def item_identity(item: Item) -> tuple:
    return item.key, item.patient, item.split, item.members


def check_source(source: Source, root: Path) -> None:
    assert re.fullmatch(r"[\w-]+/\d+", source.reader), "reader is its name and version, such as volumes/1"
    assert source.dataset
    assert source.items
    assert source.class_names
    assert len(set(source.class_names)) == len(source.class_names)
    keys = [key for item in source.items for key in (item.key, *item.members)] + [key for key, _ in source.refused]
    assert len(set(keys)) == len(keys)
    assert not any(Path(key).is_absolute() or str(root) in key for key in keys), "keys are relative to the root"
    assert {item.split for item in source.items} <= {*SPLITS, None}
    for patient in {item.patient for item in source.items}:
        assert len({item.split for item in source.items if item.patient == patient}) == 1
    assert str(root) not in json.dumps([dict(source.options), source.notes]), "options and notes hold no paths"


def load_all(source: Source) -> tuple[list[Loaded], list[str]]:
    """What can be loaded, each item as it travels to another process; the reasons of all refusals."""
    loaded: list[Loaded] = []
    refusals = [refusal for _, refusal in source.refused]
    for item in source.items:
        try:
            one = pickle.loads(pickle.dumps(item)).load()
        except Refusal as refusal:
            refusals.append(refusal)
            continue
        if isinstance(one, PictureBatch):
            refusals += [refusal for _, refusal in one.refused]
            names = [picture.name for picture in one.pictures] + [name for name, _ in one.refused]
            assert sorted(names) == sorted(item.members)
        else:
            assert item.members == ()
            assert one.patient == item.patient, "the item is split by another patient than its series has"
        loaded.append(one)
    for refusal in refusals:
        assert refusal.reason in REASONS
        for item in source.items:
            assert item.patient not in refusal.detail
            assert item.key not in refusal.detail
    return loaded, [refusal.reason for refusal in refusals]


def check_loaded(one: Loaded, source: Source) -> None:
    assert set(one.warnings) <= WARNINGS.keys()
    num_classes = len(source.class_names)
    for picture in one.pictures if isinstance(one, PictureBatch) else ():
        assert picture.image_label is None or 0 <= picture.image_label < num_classes
        check_truth(picture.truth, picture.rows, picture.columns, num_classes)
    if isinstance(one, CTSeries):
        hu, affine = one.volume.hu, one.volume.affine
        assert hu.dtype == np.int16
        assert affine.dtype == np.float64
        assert np.linalg.det(affine[:3, :3]) > 0, "columns, rows and slices must be right-handed, as LPS is"
        assert len(one.truths) == len(hu)
        for truth in one.truths:
            check_truth(truth, *hu.shape[1:], num_classes)


def check_truth(truth: Truth, rows: int, columns: int, num_classes: int) -> None:
    """Boxes with labels, or neither: null where nobody looked, empty where nothing was found."""
    assert (truth.boxes is None) == (truth.labels is None)
    if truth.boxes is not None and truth.labels is not None:
        assert truth.boxes.dtype == np.float32
        assert truth.boxes.shape == (len(truth.labels), 4)
        assert np.issubdtype(truth.labels.dtype, np.integer)
        assert set(truth.labels.tolist()) <= set(range(1, num_classes + 1))
        for x1, y1, x2, y2 in truth.boxes:
            assert 0 <= x1 < x2 <= columns
            assert 0 <= y1 < y2 <= rows
    if truth.mask is not None:
        assert truth.mask.shape == (rows, columns)
        assert truth.mask.max() <= num_classes


def check_rows(shards: ShardSet, loaded: list[Loaded], source: Source) -> list[Row]:
    """What is stored is what was loaded, in the order of the items."""
    with_pictures = [one for one in loaded if not isinstance(one, PictureBatch) or one.pictures]
    assert len(shards.entries) == len(with_pictures)
    all_rows: list[Row] = []
    for entry, one in zip(shards.entries, with_pictures, strict=True):
        rows = list(shards.iter_rows(entry))
        if isinstance(one, CTSeries):
            stored = [
                (one.patient, one.study, one.series, hu, truth)
                for hu, truth in zip(one.volume.hu, one.truths, strict=True)
            ]
            assert [row["z_index"] for row in rows] == list(range(one.first_index, one.first_index + len(rows)))
            assert all(row["affine"] == one.volume.affine.ravel().tolist() for row in rows)
        else:
            stored = [(picture.name, picture.name, picture.name, picture, picture.truth) for picture in one.pictures]
        for row, (patient, study, series, image, truth) in zip(rows, stored, strict=True):
            assert row_is_intact(row)
            assert (row["dataset"], row["reader"]) == (source.dataset, source.reader)
            assert row["split"] in SPLITS
            for name, identity in (("patient", patient), ("study", study), ("series", series)):
                assert row[name] == hashed_id(identity, ID_KEY) != identity
            if isinstance(image, Picture):
                assert (row["image"], row["image_label"]) == (image.jpeg, image.image_label)
                assert decode_image(row).shape == (3, image.rows, image.columns)
            else:
                np.testing.assert_array_equal(decode_image(row), image)
            check_same_truth(decode_truth(row), truth)
        all_rows += rows
    return all_rows


def check_same_truth(stored: Truth, truth: Truth) -> None:
    for name in ("boxes", "labels", "mask"):
        ours, theirs = getattr(stored, name), getattr(truth, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)


def check_files(folder: Path, source: Source, loaded: list[Loaded]) -> None:
    """One schema for all data sets; no name of a patient, series or file in any text."""
    for path in folder.glob("*.parquet"):
        assert pq.read_schema(path).equals(SCHEMA)
    texts = "".join(path.read_text() for path in folder.glob("*.json"))
    names = {name for item in source.items for name in (item.key, item.patient, *item.members)}
    names |= {name for one in loaded if isinstance(one, CTSeries) for name in (one.study, one.series)}
    assert [name for name in sorted(names) if name in texts] == []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
