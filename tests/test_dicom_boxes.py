"""A folder of DICOM with a CSV table of boxes."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from mp3d.data.box_table import read_box_tables
from mp3d.data.dicom_boxes import read_dicom_boxes
from mp3d.data.prepare import prepare
from mp3d.data.series import CTSeries
from mp3d.errors import ConfigError, DataError, Refusal
from tests.dicom_files import SERIES_UID, ct_slices, enhanced, made_volume, to_bytes, to_files

VOLUME = made_volume(shape=(6, 12, 14), spacing_mm=(2.5, 0.8, 0.6))
HEADER = "SeriesInstanceUID,SOPInstanceUID,z_mm,x1,y1,x2,y2,label"


def row(
    image: int | str = 3, box: str = "1,2,5.5,6", label: str = "lesion", z_mm: str = "", series: str = SERIES_UID
) -> str:
    """A box on a slice, counted from 1 and ascending."""
    return f"{series},{f'{SERIES_UID}.{image}' if image else ''},{z_mm},{box},{label}"


def write(root: Path, *rows: str, header: str = HEADER) -> Path:
    for name, file in to_files(ct_slices(VOLUME)).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(file)
    (root / "boxes.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


def load(root: Path, **options) -> CTSeries:
    source = read_dicom_boxes(root, **options)
    assert source.refused == ()
    (item,) = source.items
    series = pickle.loads(pickle.dumps(item)).load()
    assert isinstance(series, CTSeries)
    return series


def boxes(series: CTSeries) -> list[list[list[float]] | None]:
    return [None if truth.boxes is None else truth.boxes.tolist() for truth in series.truths]


def test_boxes_lie_on_the_slices_they_name(tmp_path: Path):
    z_mm = (VOLUME.affine @ [0, 0, 5, 1])[2] + 0.2
    series = load(
        write(
            tmp_path,
            row(3),
            row(0, "0,0,3,3", z_mm=str(z_mm)),
            row(3, "10,8,14,12", "cyst"),
            row(1, "2,2,3,3", z_mm="99"),
        )
    )
    assert boxes(series) == [[[2, 2, 3, 3]], [], [[1, 2, 5.5, 6], [10, 8, 14, 12]], [], [], [[0, 0, 3, 3]]]
    assert series.truths[2].labels is not None
    assert series.truths[2].labels.tolist() == [2, 1]
    assert read_dicom_boxes(tmp_path).class_names == ("cyst", "lesion")
    np.testing.assert_array_equal(series.volume.hu, VOLUME.hu)
    assert series.warnings == ()


def test_only_the_named_slices_were_searched(tmp_path: Path):
    root = write(tmp_path, row(3), row(5, ",,,"))
    assert boxes(load(root, whole_series=False)) == [None, None, [[1, 2, 5.5, 6]], None, [], None]
    assert boxes(load(root)) == [[], [], [[1, 2, 5.5, 6]], [], [], []]


@pytest.mark.parametrize("whole_series", [True, False])
def test_a_row_without_slice_and_box_says_that_there_is_nothing(tmp_path: Path, whole_series: bool):
    assert boxes(load(write(tmp_path, row("", ",,,")), whole_series=whole_series)) == [[]] * 6
    assert read_dicom_boxes(tmp_path).class_names == ("lesion",)


def test_a_series_without_a_row_was_not_searched(tmp_path: Path):
    root = write(tmp_path, row(series="1.2.3"), row(series="1.2.3"))
    assert boxes(load(root)) == [None] * 6
    assert read_dicom_boxes(root).notes == ("2 rows of the table are of series that are not here",)


def test_without_a_column_of_labels_all_are_lesions(tmp_path: Path):
    root = write(
        tmp_path,
        f"{SERIES_UID},{SERIES_UID}.2,1,1,3,3,spare",
        header="SeriesInstanceUID,SOPInstanceUID,x1,y1,x2,y2,comment",
    )
    assert boxes(load(root))[1] == [[1, 1, 3, 3]]
    assert read_dicom_boxes(root).class_names == ("lesion",)


def test_as_spreadsheets_write_it(tmp_path: Path):
    """With a byte order mark, CRLF, spaces, quotes, and blank lines and columns at the end."""
    root = write(tmp_path)
    lines = [
        f" {HEADER.replace(',', ' , ')},,",
        f'"{SERIES_UID}","{SERIES_UID}.2",, 1 ,"1",3,3,"a, b",,',
        ",,,,,,,,,",
        "",
    ]
    (root / "boxes.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert boxes(load(root))[1] == [[1, 1, 3, 3]]
    assert read_dicom_boxes(root).class_names == ("a, b",)


@pytest.mark.parametrize(
    ("box", "kept", "warning"),
    [
        ("-3,2,5,6", [[0, 2, 5, 6]], "BOX_CLIPPED"),
        ("9,9,14.5,13", [[9, 9, 14, 12]], "BOX_CLIPPED"),
        ("4,2,4,6", None, "BOX_DROPPED"),
        ("4,6,5,6", None, "BOX_DROPPED"),
        ("14,2,16,6", None, "BOX_DROPPED"),
        ("-5,-5,-1,-1", None, "BOX_DROPPED"),
    ],
)
def test_what_leaves_the_image_is_cut_and_what_has_no_extent_is_dropped(tmp_path: Path, box: str, kept, warning: str):
    series = load(write(tmp_path, row(3, box)))
    assert boxes(series) == [[], [], kept, [], [], []]
    assert series.warnings == (warning,)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (row(3, "1,2,nan,6"), "line 3 .*has a x2 that is not finite"),
        (row(3, "1,-inf,4,6"), "line 3 .*has a y1 that is not finite"),
        (row(3, "1,2,,6"), "line 3 .*has no number as x2"),
        (row(3, "1,2,five,6"), "line 3 .*has no number as x2"),
        (row(3, "1;5,2,4,6"), "line 3 .*has no number as x1"),
        (row(3, "1,5,2,4,6"), "line 3 .*write decimals with a point"),
        (row(3, "5,2,1,6"), "line 3 .*x1 above x2"),
        (row(3, "1,6,5,2"), "line 3 .*y1 above y2"),
        (row(""), "line 3 .*no slice"),
        (row(3, label=""), "line 3 .*no label"),
        (row("", z_mm="low"), "line 3 .*has no number as z_mm"),
        (row("", z_mm="nan"), "line 3 .*has a z_mm that is not finite"),
    ],
)
def test_a_row_that_cannot_be_used_refuses_its_series(tmp_path: Path, wrong: str, told: str):
    source = read_dicom_boxes(write(tmp_path, row(), wrong, row(3, "0,0,-1,nan")))
    ((_, refusal),) = source.refused
    assert source.items == ()
    with pytest.raises(Refusal, match=f"BAD_BOX.*{told}"):
        raise refusal
    assert SERIES_UID not in refusal.detail


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (row(9), "line 3 .*names a SOPInstanceUID that is no slice of its series"),
        (
            row("", z_mm="-203.5"),
            "line 3 .*z_mm -203.5, where no slice is; they lie from -204.5 to -192 mm, 2.5 mm apart",
        ),
        (row("", z_mm="-207"), "line 3 .*where no slice is"),
        (row("", z_mm="-189.5"), "line 3 .*where no slice is"),
    ],
)
def test_a_slice_that_is_not_there_refuses_the_series(tmp_path: Path, wrong: str, told: str):
    (item,) = read_dicom_boxes(write(tmp_path, row(), wrong)).items
    with pytest.raises(Refusal, match=f"BOX_OFF_SLICE.*{told}"):
        item.load()


def test_z_mm_of_a_series_along_another_axis(tmp_path: Path):
    """A coronal stack has one z for all slices."""
    coronal = made_volume(shape=(6, 12, 14), orientation=(1, 0, 0, 0, 1e-9, -1))
    for number, ds in enumerate(ct_slices(coronal)):
        (tmp_path / f"{number}.dcm").write_bytes(to_bytes(ds))
    (tmp_path / "boxes.csv").write_text(f"{HEADER}\n{row('', z_mm=str(coronal.affine[2, 3]))}\n")
    (item,) = read_dicom_boxes(tmp_path).items
    with pytest.raises(Refusal, match="BOX_OFF_SLICE"):
        item.load()
    (tmp_path / "boxes.csv").write_text(f"{HEADER}\n{row(4)}\n")
    found = [z for z, truth in enumerate(read_dicom_boxes(tmp_path).items[0].load().truths) if len(truth.boxes)]
    assert found == [3]


def test_frames_of_an_enhanced_ct_go_by_z_mm(tmp_path: Path):
    image = enhanced(ct_slices(VOLUME))
    (tmp_path / "image.dcm").write_bytes(to_bytes(image))
    z_mm = (VOLUME.affine @ [0, 0, 4, 1])[2]
    (tmp_path / "boxes.csv").write_text(f"{HEADER}\n{row('', z_mm=str(z_mm))}\n")
    assert boxes(load(tmp_path))[4] == [[1, 2, 5.5, 6]]
    (tmp_path / "boxes.csv").write_text(f"{HEADER}\n{row('0.2')}\n")
    (item,) = read_dicom_boxes(tmp_path).items
    with pytest.raises(Refusal, match="BOX_OFF_SLICE.*line 2 .*6 frames of one image; give z_mm"):
        item.load()


def test_two_acquisitions_of_one_series(tmp_path: Path):
    """Each box belongs to the stack that has its image; the other stack was not searched."""
    first, second = ct_slices(VOLUME), ct_slices(VOLUME)
    for ds in second:
        ds.AcquisitionNumber = 2
        ds.SOPInstanceUID += ".7"
    for number, ds in enumerate(first + second):
        (tmp_path / f"{number:02}.dcm").write_bytes(to_bytes(ds))
    (tmp_path / "boxes.csv").write_text(f"{HEADER}\n{row('3.7')}\n")
    without, with_box = sorted((boxes(item.load()) for item in read_dicom_boxes(tmp_path).items), key=str)
    assert without == [None] * 6
    assert with_box == [[], [], [[1, 2, 5.5, 6]], [], [], []]
    (tmp_path / "boxes.csv").write_text(f"{HEADER}\n{row('99')}\n")
    for item in read_dicom_boxes(tmp_path).items:
        with pytest.raises(Refusal, match="BOX_OFF_SLICE"):
            item.load()


def test_tables_anywhere_and_by_name(tmp_path: Path):
    root = write(tmp_path / "in", row(3))
    (root / "canary" / "boxes.csv").write_text(f"{HEADER}\n{row(4)}\n")
    assert [len(found or ()) for found in boxes(load(root))] == [0, 0, 1, 1, 0, 0]
    (tmp_path / "mine.csv").write_text(f"{HEADER}\n{row(5)}\n")
    assert [len(found or ()) for found in boxes(load(root, boxes=tmp_path / "mine.csv"))] == [0, 0, 0, 0, 1, 0]


def test_another_table_is_another_data_set(tmp_path: Path):
    root = write(tmp_path / "in", row(3))
    prepare(read_dicom_boxes(root), tmp_path / "out", id_key=b"k", runner="local")
    write(root, row(4))
    with pytest.raises(ConfigError, match="boxes_sha256"):
        prepare(read_dicom_boxes(root), tmp_path / "out", id_key=b"k", runner="local")


class TestTable:
    def read(self, folder: Path, content: bytes) -> None:
        (folder / "boxes.csv").write_bytes(content)
        read_box_tables([folder / "boxes.csv"])

    @pytest.mark.parametrize("column", ["SeriesInstanceUID", "x1", "y2"])
    def test_missing_column(self, tmp_path: Path, column: str):
        with pytest.raises(DataError, match=f"no column {column};"):
            self.read(tmp_path, HEADER.replace(column, "other").encode())

    def test_no_column_for_the_slice(self, tmp_path: Path):
        with pytest.raises(DataError, match="no column SOPInstanceUID or z_mm"):
            self.read(tmp_path, b"SeriesInstanceUID,x1,y1,x2,y2\n")

    @pytest.mark.parametrize("content", [b"", HEADER.replace(",", ";").encode(), HEADER.replace(",", "\t").encode()])
    def test_other_separators(self, tmp_path: Path, content: bytes):
        with pytest.raises(DataError, match="with commas between"):
            self.read(tmp_path, content)

    def test_a_row_of_no_series_is_named(self, tmp_path: Path):
        with pytest.raises(DataError, match=r"boxes\.csv, line 4 has no SeriesInstanceUID"):
            self.read(tmp_path, f"{HEADER}\n{row()}\n,,,,,,,\n{row(series='')}\n".encode())

    @pytest.mark.parametrize(
        "content", [HEADER.encode("utf-16"), b"\xff\xfe\xff", f'{HEADER}\n"{"a" * 200_000}"\n'.encode()]
    )
    def test_what_is_no_csv_in_utf_8(self, tmp_path: Path, content: bytes):
        with pytest.raises(DataError, match="cannot be read as CSV in UTF-8"):
            self.read(tmp_path, content)

    def test_too_large_or_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        with pytest.raises(DataError, match="cannot be read"):
            read_box_tables([tmp_path / "none.csv"])
        with pytest.raises(DataError, match=r"has no boxes\.csv"):
            read_dicom_boxes(tmp_path)
        monkeypatch.setattr("mp3d.data.box_table.MAX_TABLE_BYTES", 9)
        with pytest.raises(DataError, match="has more than 0 MiB"):
            self.read(tmp_path, HEADER.encode())
