"""NRRD and MetaImage: what SimpleITK writes comes back, and what it would take in silence is refused."""

import gzip
import re
import resource
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mp3d.data.series import CTSeries, Volume
from mp3d.data.stored_volume import MAX_BYTES
from mp3d.data.volume_file import is_volume_file, read_volume_file
from mp3d.data.volumes import load_image, read_volumes
from mp3d.errors import Refusal
from tests.dicom_files import made_volume, random_orientation

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
OBLIQUE = made_volume(shape=(5, 6, 9), orientation=(0.96, 0.28, 0, -0.28, 0.96, 0))


def image_of(array: np.ndarray, affine: np.ndarray = OBLIQUE.affine) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def write(folder: Path, ending: str, packed: bool = False, array: np.ndarray = OBLIQUE.hu, codes: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image = image_of(array)
    path = folder / f"image{ending}"
    sitk.WriteImage(sitk.DICOMOrient(image, codes) if codes else image, path, useCompression=packed)
    return path


def refused(path: Path) -> str:
    with pytest.raises(Refusal) as caught:
        load_image(path)
    assert "image.n" not in str(caught.value)
    assert "image.m" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_written_by_simpleitk(tmp_path: Path, ending: str, packed: bool) -> None:
    volume, warnings = load_image(write(tmp_path, ending, packed))
    np.testing.assert_array_equal(volume.hu, OBLIQUE.hu)
    np.testing.assert_allclose(volume.affine, OBLIQUE.affine, atol=1e-4)
    assert warnings == ()


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAR", "ILP"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_any_axis_codes(tmp_path: Path, ending: str, codes: str) -> None:
    volume, _ = load_image(write(tmp_path, ending, codes=codes))
    np.testing.assert_array_equal(volume.hu, OBLIQUE.hu)
    np.testing.assert_allclose(volume.affine, OBLIQUE.affine, atol=1e-4)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_any_direction_lies_where_simpleitk_sees_it(tmp_path: Path, ending: str) -> None:
    """Also mirrored axes; the affine of the file's own axes, before any turning."""
    for seed in range(6):
        affine = made_volume(orientation=random_orientation(np.random.default_rng(seed))).affine
        image = image_of(OBLIQUE.hu, affine @ np.diag([1, 1, -1 if seed % 2 else 1, 1]))
        sitk.WriteImage(image, tmp_path / f"image{ending}")
        stored = read_volume_file(tmp_path / f"image{ending}", "the image")
        assert stored.affine is not None
        for index in ((0, 0, 0), (8, 0, 0), (1, 5, 0), (2, 3, 4)):
            np.testing.assert_allclose(
                (stored.affine @ [*index, 1])[:3], image.TransformIndexToPhysicalPoint(index), atol=1e-3
            )
            assert stored.stored[index] == image[index]


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_types(tmp_path: Path, ending: str, dtype: str) -> None:
    array = np.arange(5 * 6 * 9).reshape(5, 6, 9) % 120
    path = write(tmp_path, ending, array=array.astype(dtype))
    if ending == ".mha" and dtype[1] == "8":  # ITK writes MET_LONG on Linux, whose size it does not say
        data = path.read_bytes()
        path.write_bytes(re.sub(rb"MET_(U?)LONG\n", rb"MET_\1LONG_LONG\n", data))
    np.testing.assert_array_equal(load_image(path)[0].hu, array)


def change(path: Path, *pairs: tuple[str, str]) -> Path:
    """Put one text of the header for another."""
    data = path.read_bytes()
    for old, new in pairs:
        assert data.count(old.encode()) == 1, old
        data = data.replace(old.encode(), new.encode())
    path.write_bytes(data)
    return path


def test_big_endian(tmp_path: Path) -> None:
    """The header is turned around, and so are the voxels."""
    path = change(write(tmp_path, ".nrrd"), ("endian: little", "endian: big"))
    path.write_bytes(path.read_bytes()[: -OBLIQUE.hu.nbytes] + OBLIQUE.hu.astype(">i2").tobytes())
    np.testing.assert_array_equal(load_image(path)[0].hu, OBLIQUE.hu)
    path = change(write(tmp_path, ".mha"), ("ByteOrderMSB = False", "ByteOrderMSB = True"))
    path.write_bytes(path.read_bytes()[: -OBLIQUE.hu.nbytes] + OBLIQUE.hu.astype(">i2").tobytes())
    np.testing.assert_array_equal(load_image(path)[0].hu, OBLIQUE.hu)


@pytest.mark.parametrize(
    ("space", "signs"), [("right-anterior-superior", (-1, -1, 1)), ("LAS", (1, -1, 1)), ("RAS", (-1, -1, 1))]
)
def test_spaces_of_nrrd(tmp_path: Path, space: str, signs: tuple[int, int, int]) -> None:
    path = change(write(tmp_path, ".nrrd"), ("space: left-posterior-superior", f"space: {space}"))
    stored = read_volume_file(path, "the image")
    assert stored.affine is not None
    np.testing.assert_allclose(stored.affine, np.diag([*signs, 1.0]) @ OBLIQUE.affine, atol=1e-4)


def test_comments_keys_and_line_ends_of_nrrd(tmp_path: Path) -> None:
    path = write(tmp_path, ".nrrd")
    head, voxels = path.read_bytes().split(b"\n\n", 1)
    more = head.replace(b"\nspace:", b'\n# sizes: 1 1 1\nsizes:=2 2 2\nspace units: "mm" "mm" "mm"\nspace:')
    path.write_bytes(more.replace(b"\n", b"\r\n") + b"\r\n\r\n" + voxels)
    np.testing.assert_array_equal(load_image(path)[0].hu, OBLIQUE.hu)


Damage = Callable[[Path], object]


def truncate(num_bytes: int) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[:-num_bytes])


def append(data: bytes) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes() + data)


def edit(*pairs: tuple[str, str]) -> Damage:
    return lambda path: change(path, *pairs)


def put(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


NRRD_DIRECTIONS = "space directions: "
LONG = "9" * 5000


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate(1), "BAD_IMAGE"),
        (truncate(400), "BAD_IMAGE"),
        (append(b"\0"), "BAD_IMAGE"),
        (put(b""), "BAD_IMAGE"),
        (put(b"NRRD0004\n"), "BAD_IMAGE"),
        (put(b"NRRD0004\nno field at all\n\n"), "BAD_IMAGE"),
        (put(b"NRRD0004\ntype: " + b"x" * 2**20), "BAD_IMAGE"),
        (put(b"NRRD0004\n" + b"#\n" * 2**14), "BAD_IMAGE"),
        (edit(("sizes: 9 6 5", "sizes: 9 6")), "NOT_3D"),
        (edit(("sizes: 9 6 5", "sizes: 9 6 5 2"), ("dimension: 3", "dimension: 4")), "NOT_3D"),
        (edit(("sizes: 9 6 5", "sizes: 9 6 5 1")), "BAD_IMAGE"),
        (edit(("sizes: 9 6 5", "sizes: 9 6 -5")), "NOT_3D"),
        (edit(("sizes: 9 6 5", "sizes: 9 6 5000")), "BAD_IMAGE"),
        (edit(("sizes: 9 6 5", "sizes: 90000 90000 90000")), "TOO_LARGE"),
        (edit(("sizes: 9 6 5", f"sizes: 9 6 {LONG}")), "BAD_IMAGE"),
        (edit(("sizes: 9 6 5", "sizes: 9 6 five")), "BAD_IMAGE"),
        (edit(("sizes: 9 6 5\n", "")), "BAD_IMAGE"),
        (edit(("type: short", "type: short\ntype: short")), "BAD_IMAGE"),
        (edit(("type: short", "type: block")), "NOT_3D"),
        (edit(("endian: little", "endian: middle")), "BAD_IMAGE"),
        (edit(("encoding: raw", "encoding: ascii")), "BAD_IMAGE"),
        (edit(("encoding: raw", "encoding: gzip")), "BAD_IMAGE"),
        (edit(("encoding: raw", "encoding: raw\nbyte skip: -1")), "BAD_IMAGE"),
        (edit(("encoding: raw", "encoding: raw\nline skip: 1")), "BAD_IMAGE"),
        (edit(("encoding: raw", "encoding: raw\ndata file: ../image.raw")), "BAD_IMAGE"),
        (edit(("encoding: raw", "encoding: raw\ndata file: /etc/passwd")), "BAD_IMAGE"),
        (edit(("encoding: raw", "encoding: raw\ndatafile: LIST")), "BAD_IMAGE"),
        (edit(("encoding: raw", "encoding: raw\ndata file: %03d.raw 1 5 1")), "BAD_IMAGE"),
        (edit(("encoding: raw", "encoding: raw\ndata file: not_there.raw")), "UNREADABLE"),
        (edit(("encoding: raw", 'encoding: raw\nspace units: "m" "m" "m"')), "BAD_IMAGE"),
        (edit(("space: left-posterior-superior", "space: scanner-xyz")), "UNKNOWN_ORIENTATION"),
        (edit(("space: left-posterior-superior", "space dimension: 3")), "UNKNOWN_ORIENTATION"),
        (edit((NRRD_DIRECTIONS, "old directions: ")), "UNKNOWN_ORIENTATION"),
        (edit(("space origin: ", "old origin: ")), "UNKNOWN_ORIENTATION"),
        (edit((NRRD_DIRECTIONS, f"{NRRD_DIRECTIONS}none ")), "BAD_IMAGE"),
        (edit((f"{NRRD_DIRECTIONS}(", f"{NRRD_DIRECTIONS}(inf,0,0) (0,1,0) (0,0,1)\nold: (")), "BAD_IMAGE"),
        (edit((f"{NRRD_DIRECTIONS}(", f"{NRRD_DIRECTIONS}(nan,0,0) (0,1,0) (0,0,1)\nold: (")), "BAD_IMAGE"),
        (edit((f"{NRRD_DIRECTIONS}(", f"{NRRD_DIRECTIONS}(0,0,0) (0,1,0) (0,0,1)\nold: (")), "BAD_IMAGE"),
        (edit((f"{NRRD_DIRECTIONS}(", f"{NRRD_DIRECTIONS}(1,1,0) (0,1,0) (0,0,1)\nold: (")), "BAD_IMAGE"),
        (edit((f"{NRRD_DIRECTIONS}(", f"{NRRD_DIRECTIONS}(20,0,0) (0,1,0) (0,0,1)\nold: (")), "BAD_SPACING"),
        (edit(("space origin: (", "space origin: (inf,0,0)\nold: (")), "BAD_IMAGE"),
        (edit(("space origin: (", "space origin: (0,0)\nold: (")), "BAD_IMAGE"),
    ],
)
def test_bad_nrrd(tmp_path: Path, damage: Damage, reason: str) -> None:
    path = write(tmp_path, ".nrrd")
    damage(path)
    assert refused(path) == reason


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate(1), "BAD_IMAGE"),
        (append(b"\0"), "BAD_IMAGE"),
        (put(b""), "BAD_IMAGE"),
        (put(b"ObjectType = Image\n"), "BAD_IMAGE"),
        (put(b"ObjectType = Image\n" * 2), "BAD_IMAGE"),
        (put(b"a=" + b"x" * 2**20), "BAD_IMAGE"),
        (put(b"".join(b"k%d = 1\n" % i for i in range(2**11))), "BAD_IMAGE"),
        (edit(("DimSize = 9 6 5", "DimSize = 9 6")), "NOT_3D"),
        (edit(("DimSize = 9 6 5", "DimSize = 9 6 5 1")), "BAD_IMAGE"),
        (edit(("DimSize = 9 6 5", "DimSize = 9 0 5")), "NOT_3D"),
        (edit(("DimSize = 9 6 5", "DimSize = 9 6 5000")), "BAD_IMAGE"),
        (edit(("DimSize = 9 6 5", "DimSize = 90000 90000 90000")), "TOO_LARGE"),
        (edit(("DimSize = 9 6 5\n", "")), "BAD_IMAGE"),
        (edit(("MET_SHORT", "MET_LONG")), "NOT_3D"),
        (edit(("MET_SHORT", "MET_SHORT_ARRAY")), "NOT_3D"),
        (edit(("ElementType", "ElementNumberOfChannels = 3\nElementType")), "NOT_3D"),
        (edit(("BinaryData = True", "BinaryData = False")), "BAD_IMAGE"),
        (edit(("ElementType", "HeaderSize = -1\nElementType")), "BAD_IMAGE"),
        (edit(("CompressedData = False", "CompressedData = True")), "BAD_IMAGE"),
        (edit(("= LOCAL", "= ../image.raw")), "BAD_IMAGE"),
        (edit(("= LOCAL", "= /etc/passwd")), "BAD_IMAGE"),
        (edit(("= LOCAL", "= LIST")), "BAD_IMAGE"),
        (edit(("= LOCAL", "= %03d.raw 1 5 1")), "BAD_IMAGE"),
        (edit(("= LOCAL", "= ")), "BAD_IMAGE"),
        (edit(("= LOCAL", "= not_there.raw")), "UNREADABLE"),
        (edit(("TransformMatrix", "Comment")), "UNKNOWN_ORIENTATION"),
        (edit(("Offset", "Comment")), "UNKNOWN_ORIENTATION"),
        (edit(("ElementSpacing", "Comment")), "UNKNOWN_ORIENTATION"),
        (edit(("ElementSpacing = ", "ElementSpacing = inf 1 1\nOld = ")), "BAD_IMAGE"),
        (edit(("ElementSpacing = ", "ElementSpacing = 0 1 1\nOld = ")), "BAD_IMAGE"),
        (edit(("ElementSpacing = ", "ElementSpacing = 1 1\nOld = ")), "BAD_IMAGE"),
        (edit(("ElementSpacing = ", "ElementSpacing = 1 1 99\nOld = ")), "BAD_SPACING"),
        (edit(("TransformMatrix = ", "TransformMatrix = 1 0 0 0.6 0.8 0 0 0 1\nOld = ")), "BAD_IMAGE"),
        (edit(("Offset = ", "Offset = nan 0 0\nOld = ")), "BAD_IMAGE"),
    ],
)
def test_bad_metaimage(tmp_path: Path, damage: Damage, reason: str) -> None:
    path = write(tmp_path, ".mha")
    damage(path)
    assert refused(path) == reason


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_every_flipped_or_missing_byte_of_packed_voxels(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, ending, packed=True)
    data = path.read_bytes()
    for back in (1, 4, 9, 300):
        path.write_bytes(data[:-back])
        assert refused(path) == "BAD_IMAGE"
        damaged = bytearray(data)
        damaged[-back if ending == ".mha" or back > 4 else -5] ^= 1  # the last four of gzip are the length
        path.write_bytes(damaged)
        assert refused(path) == "BAD_IMAGE"


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_a_bomb_is_not_unpacked(tmp_path: Path, ending: str) -> None:
    """A few kilobytes that would become more voxels than the header says, and a header that asks for too many."""
    path = write(tmp_path, ending, packed=True)
    zeros = bytes(16 * 2**20)
    if ending == ".nrrd":
        path.write_bytes(path.read_bytes().split(b"\n\n")[0] + b"\n\n" + gzip.compress(zeros))
        size = "sizes: 9 6 5"
    else:
        path.write_bytes(path.read_bytes().partition(b"LOCAL\n")[0] + b"LOCAL\n" + zlib.compress(zeros))
        size = "DimSize = 9 6 5"
    assert refused(path) == "BAD_IMAGE"
    side = int((MAX_BYTES / 4) ** (1 / 3))
    change(path, (size, size.replace("9 6 5", f"{side} {side} {side}")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(path) == "BAD_IMAGE"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # kilobytes


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    values = OBLIQUE.hu.astype(np.float32)
    values[2, 3, 4] = np.nan
    for ending in (".nrrd", ".mha"):
        assert refused(write(tmp_path, ending, array=values)) == "BAD_IMAGE"


def test_image_and_mask_of_two_formats(tmp_path: Path) -> None:
    """A header with its voxels beside it is one volume, and the voxels' file is none."""
    mask = np.zeros(OBLIQUE.hu.shape, np.uint8)
    mask[1:3, 2:5, 3:8] = 1
    write(tmp_path / "p1", ".mhd")
    sitk.WriteImage(image_of(mask), tmp_path / "p1" / "mask.nrrd")
    source = read_volumes(tmp_path, image="image*", mask="mask*")
    (item,) = source.items
    series = item.load()
    assert isinstance(series, CTSeries)
    assert series.patient == "p1"
    np.testing.assert_array_equal([truth.mask for truth in series.truths], mask)
    assert [truth.instances.tolist() for truth in series.truths if truth.instances is not None] == [
        [],
        [1],
        [1],
        [],
        [],
    ]
    assert not is_volume_file(tmp_path / "p1" / "image.raw")


def test_a_mask_elsewhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "p1", ".nrrd")
    shifted = Volume(OBLIQUE.hu, OBLIQUE.affine + np.array([[0, 0, 0, 2.5], *[[0] * 4] * 3]))
    sitk.WriteImage(image_of(np.zeros(OBLIQUE.hu.shape, np.uint8), shifted.affine), tmp_path / "p1" / "mask.mha")
    (item,) = read_volumes(tmp_path, image="*.nrrd", mask="*.mha").items
    with pytest.raises(Refusal, match=r"MASK_MISMATCH.*2\.50 mm"):
        item.load()
