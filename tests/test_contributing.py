"""The reader that CONTRIBUTING.md shows runs as it is printed: through `prepare`, and from the command line."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK as sitk

from jobs import prepare as job
from mp3d.data.prepare import prepare
from mp3d.data.shard import decode_image, decode_truth, open_shards
from mp3d.errors import Refusal
from tests.reader_contract import check_reader
from tests.reader_worlds import World
from tests.tiny import ID_KEY

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
MAX_LINES = 40
DEPTH, HEIGHT, WIDTH = 5, 12, 16
SPACING_XYZ_MM, ORIGIN_MM = (0.8, 0.9, 3.0), (-10.0, 20.0, 30.0)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The printed code, as a module."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= MAX_LINES
    (tmp_path / "printed_reader.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "printed_reader", raising=False)
    return importlib.import_module("printed_reader")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four volumes of four patients, one of them damaged; the first has two boxes on slice 1 and one on slice 3."""
    root = tmp_path / "mine"
    root.mkdir()
    lines = ["file,patient,slice,x1,y1,x2,y2"]
    for index in range(3):
        image = sitk.GetImageFromArray(volume(index))
        image.SetSpacing(SPACING_XYZ_MM)
        image.SetOrigin(ORIGIN_MM)
        sitk.WriteImage(image, str(root / f"{index}.mha"))
        lines.append(f"{index}.mha,patient {index},1,2,3,6,8")
    lines += ["0.mha,patient 0,1,8,1,12.5,4", "0.mha,patient 0,3,1,1,4,4", "broken.mha,patient 3,0,1,1,4,4"]
    (root / "broken.mha").write_bytes(b"ObjectType = Image\n")
    (root / "boxes.csv").write_text("\n".join(lines) + "\n")
    return root


def volume(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(-1000, 1000, (DEPTH, HEIGHT, WIDTH)).astype(np.int16)


def test_prepare_stores_what_the_printed_reader_reads(reader: ModuleType, root: Path, tmp_path: Path):
    result = prepare(reader.read_mha(root), tmp_path / "shards", id_key=ID_KEY, runner="local")
    assert [(key, reject.reason) for key, reject in result.rejects] == [("broken.mha", "BAD_IMAGE")]
    shards = open_shards(tmp_path / "shards")
    stored = [shards.read_rows(entry, 0, DEPTH) for entry in shards.entries]
    (rows,) = [rows for rows in stored if np.array_equal(decode_image(rows[0]), volume(0)[0])]
    assert all(np.array_equal(decode_image(row), hu) for row, hu in zip(rows, volume(0), strict=True))
    found = [decode_truth(row) for row in rows]
    assert [len(truth.boxes) for truth in found if truth.boxes is not None] == [0, 2, 0, 1, 0]
    assert found[1].boxes is not None
    assert found[1].boxes.tolist() == [[2, 3, 6, 8], [8, 1, 12.5, 4]]
    assert rows[0]["spacing_mm"] == pytest.approx(SPACING_XYZ_MM[::-1])
    affine = np.diag([*SPACING_XYZ_MM, 1])
    affine[:3, 3] = ORIGIN_MM
    assert rows[0]["affine"] == pytest.approx(affine.ravel())


def test_the_printed_reader_keeps_to_the_contract(reader: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch):
    world = World({"root": root}, boxes={2: 1, 1: 3, 0: 11}, refused=("BAD_IMAGE",))
    check_reader(reader.read_mha, world, root, monkeypatch)


@pytest.mark.parametrize(
    "direction",
    [
        (1, 0, 0, 0, 1, 0, 0, 0, -1),
        (-1, 0, 0, 0, -1, 0, 0, 0, 1),
        (0, 1, 0, 1, 0, 0, 0, 0, 1),
        (0.6, -0.8, 0, 0.8, 0.6, 0, 0, 0, 1),
        (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, -1),
    ],
)
def test_voxels_and_boxes_keep_their_place_however_the_file_lies(
    reader: ModuleType, root: Path, tmp_path: Path, direction: tuple[float, ...]
):
    """Voxels are found at their millimetres, and boxes of whole pixels enclose the same voxels as in the file."""
    image = sitk.ReadImage(str(root / "0.mha"))
    image.SetDirection(direction)
    sitk.WriteImage(image, str(root / "0.mha"))
    series = reader.read_mha(root).items[0].load()
    hu, affine = series.volume.hu, series.volume.affine
    for x, y, z in ((0, 0, 0), (3, 0, 0), (2, 5, 4)):
        place = np.linalg.solve(affine, [*image.TransformIndexToPhysicalPoint((x, y, z)), 1]).round().astype(int)
        assert hu[tuple(place[2::-1])] == volume(0)[z, y, x]
        assert (affine @ place)[:3] == pytest.approx(image.TransformIndexToPhysicalPoint((x, y, z)))
    found = [
        np.sort(hu[z, int(y1) : int(y2), int(x1) : int(x2)].ravel()).tolist()
        for z, truth in enumerate(series.truths)
        for x1, y1, x2, y2 in truth.boxes
        if all(float(edge).is_integer() for edge in (x1, y1, x2, y2))
    ]
    assert len(found) == 2
    assert np.sort(volume(0)[1, 3:8, 2:6].ravel()).tolist() in found
    assert np.sort(volume(0)[3, 1:4, 1:4].ravel()).tolist() in found
    assert [len(truth.boxes) for truth in series.truths] == ([0, 1, 0, 2, 0] if direction[-1] < 0 else [0, 2, 0, 1, 0])
    result = prepare(reader.read_mha(root), tmp_path / "shards", id_key=ID_KEY, runner="local")
    assert [reject.reason for _, reject in result.rejects] == ["BAD_IMAGE"]


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "BAD_IMAGE"), (40000, None), (-1e9, None)])
def test_values_that_int16_does_not_hold(reader: ModuleType, root: Path, value: float, reason: str | None):
    values = volume(0).astype(np.float32)
    values[2, 3, 4] = value
    sitk.WriteImage(sitk.GetImageFromArray(values), str(root / "0.mha"))
    item = reader.read_mha(root).items[0]
    if reason:
        with pytest.raises(Refusal, match=f"{reason}.*slice 3 of 5"):
            item.load()
        return
    series = item.load()
    assert series.volume.hu[2, 3, 4] == np.clip(value, -32768, 32767)
    assert series.warnings == ("HU_CLIPPED",)


@pytest.mark.parametrize("number", ["5", "-1", "1.5", "nan"])
def test_a_box_on_no_slice_is_not_lost(reader: ModuleType, root: Path, number: str):
    table = root / "boxes.csv"
    table.write_text(table.read_text() + f"0.mha,patient 0,{number},1,1,4,4\n")
    with pytest.raises(Refusal, match=f"BOX_OFF_SLICE.*on slice {number},"):
        reader.read_mha(root).items[0].load()


def test_a_sagittal_file_has_no_axial_slice_with_a_box(reader: ModuleType, root: Path):
    image = sitk.ReadImage(str(root / "0.mha"))
    image.SetDirection((0, 0, 1, 1, 0, 0, 0, 1, 0))
    sitk.WriteImage(image, str(root / "0.mha"))
    with pytest.raises(Refusal, match="BOX_OFF_SLICE"):
        reader.read_mha(root).items[0].load()


def test_the_printed_command_is_one(reader: ModuleType, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, place = re.findall(r'^    "(\w+)": "([\w.:]+)"$', TEXT, re.MULTILINE)[0]
    function = place.partition(":")[2]
    monkeypatch.setitem(job.READERS, name, f"printed_reader:{function}")
    (command,) = re.findall(r"^    python jobs/prepare.py (.*)$", TEXT, re.MULTILINE)
    options, read = job.parse(command.split())
    assert options.out == Path("data/mine")
    assert read.func.__name__ == function
    assert read.keywords == {"root": Path("mine"), "table": "boxes.csv"}
    monkeypatch.setenv("MP3D_ROOT", str(tmp_path))
    assert job.main(["--runner", "local", *command.split()]) == job.TOO_MANY_REJECTS
    assert len(open_shards(tmp_path / "data" / "mine").entries) == 3
