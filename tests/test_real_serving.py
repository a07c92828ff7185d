"""A real CT series through the client's zip and the endpoint's engine."""

import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch

from mp3d.client import zipped
from mp3d.config import ServeConfig
from mp3d.predict import Predictor
from mp3d.serving.engine import Engine
from mp3d.serving.schema import ModelOut
from tests.serving_world import BrightBoxes, tiny_config

DATA = Path(os.environ.get("MP3D_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
SERIES = DATA / "lidc" / "LIDC-IDRI-0001"
pytestmark = pytest.mark.skipif(not SERIES.is_dir(), reason=f"no LIDC series in {SERIES}")


def test_findings_lie_where_the_headers_say():
    model = ModelOut(name="bright", digest="d" * 64, config_hash="c" * 64, epoch=1, score=0, num_classes=1)
    predictor = Predictor(BrightBoxes(), tiny_config().clip, 0.5, torch.device("cpu"))
    with zipped(SERIES) as body:
        answer = Engine(predictor, model, ServeConfig(checkpoint="none")).answer(body.read())
    headers = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, SERIES.rglob("*.dcm"))}
    assert answer.num_slices == len(headers) == len(answer.findings)
    for found in answer.findings:
        header = headers[found.sop_instance_uid]
        row_spacing, column_spacing = header.PixelSpacing
        along_row, along_column = np.array(header.ImageOrientationPatient).reshape(2, 3)
        x1, y1, x2, y2 = found.box_px
        column, row = (x1 + x2) / 2 - 0.5, (y1 + y2) / 2 - 0.5
        expected = (
            np.array(header.ImagePositionPatient)
            + column * column_spacing * along_row
            + row * row_spacing * along_column
        )
        assert found.centre_lps_mm == pytest.approx(expected, abs=1e-3)
        bright = header.pixel_array * header.RescaleSlope + header.RescaleIntercept > 0
        rows, columns = np.nonzero(bright)
        assert found.box_px == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
