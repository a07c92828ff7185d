"""Random series against known truth: right Hounsfield units and affine, or the named refusal, never anything else."""

import tempfile
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.valuerep import format_number_as_ds

from mp3d.config import GeometryPolicy
from mp3d.data.dicom import group_series, load_volume
from mp3d.data.geometry import MAX_RESAMPLED_GAP, MAX_RESAMPLED_GAP_MM
from mp3d.data.series import AIR_HU, Volume
from mp3d.errors import Refusal
from tests.dicom_files import (
    FUNCTIONAL_GROUPS,
    ct_slices,
    enhanced,
    made_volume,
    random_orientation,
    set_stored,
    to_bytes,
    to_files,
)

Kind = Literal[
    "clean", "jitter", "missing", "end missing", "copy", "other image", "tilt", "moved", "aside", "localizer",
    "slope 0", "no slope", "no spacing", "two phases",
]  # fmt: skip
JITTER_MM = 0.02
AFFINE_MM = 1e-4
HU = 0.5 + 1e-3
"""Half a unit for rounding once; the rest is float32."""


@dataclass(frozen=True)
class Case:
    kind: Kind
    seed: int
    num_slices: int
    spacing_mm: tuple[float, float, float]
    tilt_deg: float
    at: float
    """Which slice is touched, as a share."""
    own_slopes: bool
    multiframe: bool
    policy: GeometryPolicy

    @property
    def index(self) -> int:
        """Of an inner slice, so that both neighbours are there."""
        return 1 + int(self.at * (self.num_slices - 2))

    @property
    def corrected(self) -> bool:
        return (self.kind == "tilt" and self.policy.tilt == "shear") or (
            self.kind in ("missing", "moved") and self.policy.uneven == "resample"
        )


def cases(kind: Kind, policy: GeometryPolicy) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        kind=st.just(kind),
        seed=st.integers(0, 2**31 - 1),
        num_slices=st.integers(6, 12),
        spacing_mm=st.tuples(st.floats(0.5, 6), st.floats(0.3, 1.2), st.floats(0.3, 1.2)),
        tilt_deg=st.one_of(st.floats(3, 30), st.floats(-30, -3)),
        at=st.floats(0, 0.999),
        own_slopes=st.booleans(),
        multiframe=st.booleans(),
        policy=st.just(policy),
    )


def write(case: Case) -> tuple[dict[str, bytes], np.ndarray, np.ndarray, Volume]:
    """Files; the true HU of each slice that is to be read, and the place of its first pixel; the clean truth."""
    rng = np.random.default_rng(case.seed)
    truth = made_volume(
        shape=(case.num_slices, 5, 7),
        spacing_mm=case.spacing_mm,
        orientation=random_orientation(rng),
        origin=rng.uniform(-500, 500, 3),
        seed=case.seed,
    )
    row, column, normal = (truth.affine[:3, :3] / np.linalg.norm(truth.affine[:3, :3], axis=0)).T
    slices = ct_slices(truth)
    hu = truth.hu.astype(float)
    places = np.array([(truth.affine @ [0, 0, z, 1])[:3] for z in range(case.num_slices)])
    if case.own_slopes and not case.corrected:  # what is interpolated is rounded twice, so it starts from whole HU
        for z, ds in enumerate(slices):
            slope, intercept = round(rng.uniform(0.2, 3), 3), round(rng.uniform(-1500, 0), 1)
            stored = np.rint((hu[z] - intercept) / slope)
            set_stored(ds, stored)
            ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
            hu[z] = slope * stored + intercept
    keep = np.ones(case.num_slices, bool)
    extra: list[Dataset] = []
    match case.kind:
        case "jitter":
            places += rng.uniform(-JITTER_MM, JITTER_MM, case.num_slices)[:, None] * normal
        case "missing":
            keep[case.index] = False
        case "end missing":
            keep[-1] = False
        case "tilt":
            along = np.arange(case.num_slices) * case.spacing_mm[0] * np.tan(np.radians(case.tilt_deg))
            places += along[:, None] * column
        case "moved":
            places[case.index] += (0.2 + 0.25 * case.at) * case.spacing_mm[0] * normal
        case "aside":
            places[case.index] += rng.choice([-1, 1]) * rng.uniform(2, 20) * (row if rng.random() < 0.5 else column)
        case "slope 0":
            slices[case.index].RescaleSlope = "0"
        case "no slope":
            slices[case.index].RescaleSlope = None
        case "no spacing":
            slices[case.index].PixelSpacing = ["0", "0.5"]
        case "localizer":
            across = made_volume(shape=(1, 5, 7), orientation=[*column, *normal], origin=places[case.index])
            extra = ct_slices(across)
        case "copy" | "other image":
            extra = [deepcopy(slices[case.index])]
            if case.kind == "other image":
                set_stored(extra[0], 1500 - np.arange(35).reshape(5, 7))
        case "two phases":
            extra = deepcopy(slices)
            for ds in extra:
                ds.AcquisitionNumber = 2
                set_stored(ds, np.zeros((5, 7)))
    for ds, place in zip(slices, places, strict=True):
        ds.ImagePositionPatient = [format_number_as_ds(float(value)) for value in place]
    if case.kind in ("copy", "other image", "two phases"):
        for ds, twin in zip(slices[case.index :] if len(extra) == 1 else slices, extra, strict=False):
            twin.ImagePositionPatient = ds.ImagePositionPatient
    for ds in extra:
        ds.SOPInstanceUID += ".77"
    files = [ds for ds, kept in zip(slices, keep, strict=True) if kept] + extra
    if case.multiframe and case.kind not in ("slope 0", "no slope", "no spacing"):
        rng.shuffle(files)
        written = {"one": to_bytes(enhanced(files, FUNCTIONAL_GROUPS))}
    else:
        written = to_files(files, seed=case.seed)
    return written, hu[keep], places[keep], truth


def expected_refusal(case: Case) -> str | None:
    gap = 2 * case.spacing_mm[0]
    fillable = gap <= min(MAX_RESAMPLED_GAP_MM, MAX_RESAMPLED_GAP * case.spacing_mm[0])
    by_kind = {
        "other image": "DUPLICATE_SLICE",
        "aside": "SHIFTED_SLICE",
        "slope 0": "BAD_RESCALE",
        "no slope": "MISSING_RESCALE",
        "no spacing": "BAD_SPACING",
        "tilt": None if case.policy.tilt == "shear" else "GANTRY_TILT",
        "moved": None if case.policy.uneven == "resample" else "UNEVEN_SPACING",
        "missing": "MISSING_SLICE" if case.policy.uneven == "refuse" else (None if fillable else "UNEVEN_SPACING"),
    }
    return by_kind.get(case.kind)


def check(case: Case) -> None:
    files, hu, places, truth = write(case)
    listing = group_series(files, case.policy)
    assert listing.refused == []
    if case.kind == "two phases":
        assert [series.warnings for series in listing.series] == [("SPLIT_BY_ACQUISITION",)] * 2
        listing.series.sort(key=lambda series: series.slices[0].acquisition_number)
    else:
        assert len(listing.series) == 1
    reason = expected_refusal(case)
    if reason:
        with pytest.raises(Refusal) as caught:
            load_volume(listing.series[0], case.policy)
        assert caught.value.reason == reason
        return
    volume, stored, warnings = load_volume(listing.series[0], case.policy)
    tell = {"localizer": "LOCALIZER_DROPPED", "copy": "DUPLICATE_DROPPED", "two phases": "SPLIT_BY_ACQUISITION"}
    corrections = {"tilt": "TILT_CORRECTED", "missing": "UNEVEN_RESAMPLED", "moved": "UNEVEN_RESAMPLED"}
    told = {tell[case.kind]} if case.kind in tell else {corrections[case.kind]} if case.corrected else set()
    assert set(warnings) - {"NOT_AXIAL"} == told
    assert len(stored) == len(volume.hu)
    if not case.corrected:
        np.testing.assert_allclose(volume.hu, hu, rtol=0, atol=HU)
        if case.kind != "jitter":
            np.testing.assert_allclose(volume.affine, truth.affine, rtol=0, atol=AFFINE_MM)
    check_in_space(case, volume, hu, places, truth)
    if case.kind == "clean" and not case.own_slopes and not case.multiframe:
        check_against_simpleitk(volume, files)


def check_in_space(case: Case, volume: Volume, hu: np.ndarray, places: np.ndarray, truth: Volume) -> None:
    """Every voxel: where its affine puts it in the patient, the slices as they were written say the same HU."""
    row, column, normal = (truth.affine[:3, :3] / np.linalg.norm(truth.affine[:3, :3], axis=0)).T
    _, y_mm, x_mm = case.spacing_mm
    heights = (places - places[0]) @ normal
    tolerance = JITTER_MM if case.kind == "jitter" else AFFINE_MM
    num_rows = hu.shape[1]
    sides = volume.affine[:3, :3].T @ volume.affine[:3, :3]
    np.testing.assert_allclose(
        sides - np.diag(np.diag(sides)), 0, atol=JITTER_MM * 10 if case.kind == "jitter" else 1e-4
    )
    covered = 0
    for z, plane in enumerate(volume.hu):
        first = (volume.affine @ [0, 0, z, 1])[:3]
        height = (first - places[0]) @ normal
        place = np.interp(height, heights, np.arange(len(heights)))
        below = min(int(place + 1e-6), len(heights) - 1)
        share = place - below
        assert abs(np.interp(place, np.arange(len(heights)), heights) - height) <= tolerance
        per_slice = []
        inside = np.ones(len(plane), bool)
        for source in (below, min(below + 1, len(heights) - 1)):
            off = (first - places[source]) - (first - places[source]) @ normal * normal
            assert abs(off @ row) <= tolerance + 1e-9  # columns are columns
            rows = np.arange(len(plane)) + off @ column / y_mm
            inside &= (rows >= -1e-6) & (rows <= num_rows - 1 + 1e-6)
            per_slice.append(np.stack([np.interp(rows, np.arange(num_rows), one) for one in hu[source].T], axis=1))
            if share < 1e-5:
                break
        mixed = per_slice[0] if len(per_slice) == 1 else (1 - share) * per_slice[0] + share * per_slice[1]
        allowed = HU if case.kind != "jitter" else HU + 1e-3
        if not case.corrected and len(per_slice) == 1:
            assert np.abs(plane[inside] - mixed[inside]).max() <= allowed
        elif case.corrected:
            assert np.abs(plane[inside] - np.maximum(mixed, AIR_HU)[inside]).max() <= allowed
            assert (plane[~inside] == AIR_HU).all()
        covered += int(inside.sum())
    if case.corrected and case.kind == "tilt":
        assert covered >= len(hu) * (num_rows - 1)  # no row of any slice is lost but to interpolation
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :2], axis=0), [x_mm, y_mm], rtol=1e-6)


def check_against_simpleitk(volume: Volume, files: dict[str, bytes]) -> None:
    """Where it is right: given the files of a regular stack in order."""
    ordered = sorted(group_series(files).series[0].slices, key=lambda header: -(header.instance_number or 0))
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for z, header in enumerate(ordered):
            names.append(str(Path(folder, f"{z}.dcm")))
            assert isinstance(header.source, bytes)
            Path(names[-1]).write_bytes(header.source)
        image = sitk.ReadImage(names)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume.hu)
    for index in ([0, 0, 0], [6, 4, len(volume.hu) - 1]):
        point = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(point, (volume.affine @ [*index, 1])[:3], atol=1e-3)


KINDS_AND_POLICIES = pytest.mark.parametrize(
    ("kind", "policy"),
    [
        pytest.param(kind, policy, id=f"{kind}-{policy.tilt}-{policy.uneven}")
        for kind in get_args(Kind)
        for policy in (GeometryPolicy(), GeometryPolicy(tilt="shear", uneven="resample"))
    ],
)


def check_random(kind: Kind, policy: GeometryPolicy, num_series: int) -> None:
    rules = settings(max_examples=num_series, deadline=None, derandomize=True, database=None)
    rules(given(cases(kind, policy))(check))()


@KINDS_AND_POLICIES
def test_a_hundred_series(kind: Kind, policy: GeometryPolicy) -> None:
    check_random(kind, policy, 4)


@pytest.mark.acceptance
@KINDS_AND_POLICIES
def test_a_thousand_series(kind: Kind, policy: GeometryPolicy) -> None:
    check_random(kind, policy, 36)
