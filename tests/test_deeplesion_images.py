"""DeepLesion's zip parts, read where they are, whatever is in them."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mp3d.data import deeplesion_images
from mp3d.data.deeplesion import read_deeplesion
from mp3d.data.deeplesion_images import SliceRun, list_slices, read_run
from mp3d.data.prepare import prepare
from mp3d.data.reasons import REASONS
from mp3d.data.series import CTSeries
from mp3d.data.shard import open_shards
from mp3d.errors import DataError, Refusal
from tests.test_deeplesion import lesion, write_slices, write_table
from tests.tiny import ID_KEY

SERIES = "000001_01_01"


def pack(root: Path, part: str, names: dict[str, str], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A zip part of slices that ``write_slices`` wrote: name in the zip by path below ``Images_png``."""
    path = root / part
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, source in names.items():
            archive.writestr(name, (root / "folders" / "Images_png" / source).read_bytes())
    return path


def members(numbers: range, prefix: str = "Images_png/", series: str = SERIES) -> dict[str, str]:
    return {f"{prefix}{series}/{n:03d}.png": f"{series}/{n:03d}.png" for n in numbers}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Slices in the folder ``folders``, to be packed; the table of two patients in both."""
    write_slices(tmp_path / "folders", SERIES, range(98, 108))
    write_slices(tmp_path / "folders", "000002_03_01", range(1, 4))
    rows = [lesion(SERIES, 100), lesion("000002_03_01", 2, Train_Val_Test="3")]
    for folder in (tmp_path, tmp_path / "folders"):
        write_table(folder, rows)
    return tmp_path


def load(root: Path, index: int = 0) -> CTSeries:
    loaded = pickle.loads(pickle.dumps(read_deeplesion(root).items[index].load))()
    assert isinstance(loaded, CTSeries)
    return loaded


@pytest.mark.parametrize("place", ["Images_png_01.zip", "Images_png/Images_png_01.zip"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_parts_give_the_same_shards_as_folders(root: Path, place: str, method: int):
    """A series that lies in two parts is one run; the second part has no folder on top."""
    pack(root, place, members(range(98, 103)), method)
    pack(
        root,
        place.replace("01.zip", "02.zip"),
        members(range(103, 108), prefix="") | members(range(1, 4), series="000002_03_01"),
        method,
    )
    for folder in ("folders", "."):
        prepare(read_deeplesion(root / folder), root / "out" / folder / "shards", id_key=ID_KEY, runner="local")
    written = sorted((root / "out" / "folders" / "shards").iterdir())
    assert [path.read_bytes() for path in written] == [
        (root / "out" / "shards" / path.name).read_bytes() for path in written
    ]
    assert sum(entry.num_rows for entry in open_shards(root / "out" / "shards").entries) == 13
    assert read_deeplesion(root).notes == ()


def test_the_folder_of_the_parts_can_be_named(root: Path):
    pack(root, "elsewhere/Images_png_07.zip", members(range(98, 101)))
    source = read_deeplesion(root, images=root / "elsewhere")
    assert [item.key for item in source.items] == [f"{SERIES}/098-100"]
    with pytest.raises(DataError, match="no folder"):
        read_deeplesion(root, images=root / "nowhere")


def test_names_are_never_paths(root: Path, tmp_path: Path):
    names = (f"../{SERIES}/100.png", f"/{SERIES}/101.png", f"Images_png/../{SERIES}/102.png", f"..\\{SERIES}\\103.png")
    strange = (f"x/Images_png/{SERIES}/104.png", f"Images_png/{SERIES}/../105.png", f"Images_png/{SERIES}/0106.png")
    pack(root, "Images_png_01.zip", members(range(98, 100)) | dict.fromkeys((*names, *strange), f"{SERIES}/100.png"))
    before = sorted(tmp_path.rglob("*"))
    (item,) = read_deeplesion(root).items
    assert item.key == f"{SERIES}/098-099"
    item.load()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_slice_in_two_places_is_read_from_the_folder(root: Path):
    other = np.full((40, 40), 32768 - 7, np.uint16)
    Image.fromarray(other).save(root / "folders" / "Images_png" / SERIES / "099.png")
    pack(root, "folders/Images_png_01.zip", members(range(98, 101)))
    pack(root, "folders/Images_png_02.zip", members(range(98, 101)))
    write_slices(root / "folders", SERIES, range(98, 108))
    source = read_deeplesion(root / "folders")
    assert source.notes == ("6 slices that lie in two places, read from the first",)
    assert load(root / "folders").volume.hu[1, 1, 1] == 99


Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"no zip")])
def test_a_part_that_cannot_be_opened_is_refused_and_the_others_are_read(root: Path, damage: Damage):
    pack(root, "Images_png_01.zip", members(range(98, 100)))
    damage(pack(root, "Images_png_02.zip", members(range(1, 4), series="000002_03_01")))
    source = read_deeplesion(root)
    assert [(key, refusal.reason) for key, refusal in source.refused] == [("Images_png_02.zip", "BAD_ARCHIVE")]
    assert [item.key for item in source.items] == [f"{SERIES}/098-099"]


def patch_member(path: Path, offset_in_local: int | None, offset_in_directory: int, value: bytes) -> None:
    """Change a field in the headers of the first member."""
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + offset_in_directory : directory + offset_in_directory + len(value)] = value
    if offset_in_local is not None:
        data[offset_in_local : offset_in_local + len(value)] = value
    path.write_bytes(data)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def replace_with_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in members(range(98, 100)):
            archive.writestr(name, bytes(deeplesion_images.MAX_SLICE_BYTES + 1))


def pack_anew(method: int) -> Damage:
    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "BAD_ARCHIVE"),
        (lambda path: patch_member(path, 6, 8, b"\x01"), "BAD_ARCHIVE"),  # the flag of encryption
        (lambda path: patch_member(path, None, 16, b"\0\0\0\0"), "BAD_ARCHIVE"),  # CRC
        (pack_anew(zipfile.ZIP_BZIP2), "BAD_ARCHIVE"),
        (pack_anew(zipfile.ZIP_LZMA), "BAD_ARCHIVE"),
        (replace_with_bomb, "TOO_LARGE"),
        (lambda path: path.unlink(), "UNREADABLE"),
        (lambda path: pack(path.parent, path.name, members(range(99, 100))), "UNREADABLE"),  # 98 is gone
    ],
)
def test_broken_members_are_refused(root: Path, damage: Damage, reason: str):
    """After listing, so that a part which was written anew is opened anew."""
    path = pack(root, "Images_png_01.zip", members(range(98, 100)))
    (item,) = read_deeplesion(root).items
    damage(path)
    if path.exists():
        os.utime(path, ns=(1, 1))
    with pytest.raises(Refusal) as caught:
        item.load()
    assert caught.value.reason == reason
    assert reason in REASONS
    assert "000001" not in str(caught.value)
    assert "Images_png_01" not in str(caught.value)


def test_a_directory_beyond_the_limit_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    pack(root, "Images_png_01.zip", members(range(98, 108)))
    monkeypatch.setattr(deeplesion_images, "MAX_DIRECTORY_BYTES", 100)
    listing = list_slices(root, None)
    assert [refusal.reason for _, refusal in listing.refused] == ["BAD_ARCHIVE"]
    assert listing.places == {}


def test_a_run_of_too_many_pixels_is_refused_after_its_first_slice(root: Path):
    folder = root / "folders" / "Images_png"
    with pytest.raises(Refusal, match="TOO_LARGE"):
        read_run(SliceRun(SERIES, 98, (folder,) * 2_000_000))
