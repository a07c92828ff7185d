"""The prediction file: every head, bit for bit, whole or refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mp3d.errors import DataError
from mp3d.evaluation import ClassifiedCase, Predictions, SegmentedCase, read_predictions, write_predictions
from mp3d.evaluation.results import pack_mask, unpack_mask
from tests.test_evaluation import RESULTS

MASK = np.random.default_rng(0).integers(0, 3, (7, 5)).astype(np.uint8)
CASES = {
    "classification": [ClassifiedCase("p", "s", 1, (0.25, -3.0)), ClassifiedCase("p", "t", 0, (1 / 3, 2.0))],
    "segmentation": [SegmentedCase("p", "s", ((1, 2, 3), (4, 5, 6)), (0.5, 2.5), 4, pack_mask(MASK))],
}


def test_detections_survive_the_file_bit_for_bit(tmp_path: Path):
    point = {"thresholds": {"1": 0.5}}
    given = Predictions("detection", RESULTS, {"checkpoint": "abc"}, "all", 2.5, point)
    back = read_predictions(write_predictions(tmp_path / "predictions.parquet", given))
    assert (back.head, back.provenance, back.slices) == ("detection", {"checkpoint": "abc"}, "all")
    assert (back.grid_spacing_mm, back.operating_point) == (2.5, point)
    for before, after in zip(RESULTS, back.records, strict=True):
        assert vars(after).keys() == vars(before).keys()
        for name, value in vars(before).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(after, name), value, strict=True)
            else:
                assert getattr(after, name) == value


def test_a_file_from_before_diameters_were_kept_has_none(tmp_path: Path):
    path = write_predictions(tmp_path / "predictions.parquet", Predictions("detection", RESULTS))
    pq.write_table(pq.read_table(path).drop_columns(["true_diameters_mm"]), path)
    for before, after in zip(RESULTS, read_predictions(path).records, strict=True):
        assert np.isnan(after.true_diameters_mm).all()
        assert len(after.true_diameters_mm) == len(before.true_boxes)


@pytest.mark.parametrize("head", CASES)
def test_cases_survive_the_file(tmp_path: Path, head):
    back = read_predictions(write_predictions(tmp_path / "predictions.parquet", Predictions(head, CASES[head])))
    assert list(back.records) == CASES[head]
    assert back.operating_point is None


def test_what_is_undefined_stays_so(tmp_path: Path):
    case = SegmentedCase("p", "s", ((0, 0, 0),), (float("nan"),))
    (back,) = read_predictions(write_predictions(tmp_path / "p", Predictions("segmentation", [case]))).records
    assert np.isnan(back.hausdorff_95_mm).all()


def test_a_mask_fits_its_slice_or_is_none():
    np.testing.assert_array_equal(unpack_mask(pack_mask(MASK), MASK.shape), MASK)
    assert unpack_mask(pack_mask(MASK), (7, 6)) is None
    assert unpack_mask(b"no zlib", MASK.shape) is None


def test_files_that_are_no_predictions_are_refused(tmp_path: Path):
    path = tmp_path / "predictions.parquet"
    with pytest.raises(DataError, match="cannot read predictions"):
        read_predictions(path)
    path.write_text("patient,series")
    with pytest.raises(DataError, match="cannot read predictions"):
        read_predictions(path)
    pq.write_table(pa.table({"patient": ["p0"]}), path)
    with pytest.raises(DataError, match="no file of the format"):
        read_predictions(path)
    write_predictions(path, Predictions("detection", RESULTS))
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["scores"]), path)
    with pytest.raises(DataError, match="other columns"):
        read_predictions(path)
    metadata = {**(table.schema.metadata or {}), b"head": b"segmentation"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match="other columns"):
        read_predictions(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    path = write_predictions(tmp_path / "predictions.parquet", Predictions("detection", RESULTS))
    before = path.read_bytes()
    wrong = Predictions("detection", [ClassifiedCase("p", "s", "no number", ())])  # type: ignore[arg-type]
    with pytest.raises(pa.ArrowInvalid):
        write_predictions(path, Predictions("classification", wrong.records))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["predictions.parquet"]
