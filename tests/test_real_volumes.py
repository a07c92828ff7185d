"""Real CT in NRRD and MetaImage, and as LiTS stores it; expected values were read off the files with other programs."""

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from mp3d.data.dicom import group_series, load_volume
from mp3d.data.lits import read_lits
from mp3d.data.series import CTSeries, boxes_3d
from mp3d.data.source import Item
from mp3d.data.volumes import load_mask, read_volumes

SHARED = Path(os.environ.get("MP3D_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data in {SHARED}")


def load(item: Item) -> CTSeries:
    loaded = item.load()
    assert isinstance(loaded, CTSeries)
    return loaded


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_a_sarcoma_is_the_same_in_every_format(tmp_path: Path, ending: str):
    source = SHARED / "sts" / "nifti" / "STS_019"
    for name in ("image", "mask"):
        image = sitk.ReadImage(source / f"CT_{name}.nii.gz")
        for key in image.GetMetaDataKeys():  # NIfTI's own, which the writers complain of
            image.EraseMetaData(key)
        sitk.WriteImage(image, tmp_path / f"{name}{ending}", useCompression=True)
    (item,) = read_volumes(tmp_path, image=f"image{ending}", mask=f"mask{ending}").items
    (expected,) = read_volumes(source).items
    ours, theirs = load(item), load(expected)
    np.testing.assert_array_equal(ours.volume.hu, theirs.volume.hu)
    np.testing.assert_allclose(ours.volume.affine, theirs.volume.affine, atol=1e-6)
    assert sum(int(truth.mask.sum()) for truth in ours.truths if truth.mask is not None) == 5564
    for a, b in zip(ours.truths, theirs.truths, strict=True):
        np.testing.assert_array_equal(a.mask, b.mask)
        np.testing.assert_array_equal(a.instances, b.instances)


def test_each_sarcoma_is_one_tumour():
    """The data set has one segmented tumour a patient; its 3D box holds the whole mask."""
    for item in read_volumes(SHARED / "sts" / "nifti").items[:4]:
        series = load(item)
        boxes, labels, _ = boxes_3d(series.truths)
        assert labels.tolist() == [1]
        z, y, x = np.nonzero([truth.mask for truth in series.truths])
        assert boxes[0].tolist() == [x.min(), y.min(), z.min(), x.max() + 1, y.max() + 1, z.max() + 1]


def test_a_mask_in_nrrd_lies_on_its_ct_in_dicom():
    folder = SHARED / "liver" / "dcmqi_ct3"
    volume, _, _ = load_volume(*group_series(folder / "ct-3slice").series)
    (mask_file,) = folder.rglob("liver_seg.nrrd")
    mask = load_mask(mask_file, volume, num_classes=1)
    assert mask.sum(axis=(1, 2)).tolist() == [36233, 35645, 35220]
    inside = volume.hu[mask == 1]
    assert (round(inside.mean()), round(inside.std())) == (37, 59)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ILP"])
def test_a_real_liver_as_lits_stores_it(tmp_path: Path, codes: str):
    """The liver of a real CT with two made tumours, the header of the image an identity as in volumes 28 to 47."""
    folder = SHARED / "liver" / "totalsegmentator"
    ct = nibabel.nifti1.load(folder / "example_ct.nii.gz")
    organs = nibabel.nifti1.load(folder / "example_seg_fast_force_split.nii.gz")
    hu, labels = np.asarray(ct.dataobj).clip(-1024, 3071).astype(np.int16), np.asarray(organs.dataobj) == 5
    tumours = np.zeros_like(labels)
    depths = ndimage.distance_transform_edt(np.pad(labels, 1))[1:-1, 1:-1, 1:-1]
    expected = []
    for size in ((6, 5, 4), (3, 4, 2)):  # the one in the deepest place, the other in the deepest far from it
        i, j, k = np.unravel_index(np.argmax(depths), labels.shape)
        tumours[i : i + size[0], j : j + size[1], k : k + size[2]] = True
        depths[i - 15 : i + 15, j - 15 : j + 15, k - 15 : k + 15] = 0
        columns, rows = labels.shape[0] - i, labels.shape[1] - j  # the CT's own axes are R, A, S: two are turned
        expected.append([columns - size[0], rows - size[1], k, columns, rows, k + size[2]])
    assert labels[tumours].all()
    hu[tumours] -= 50
    start = nibabel.orientations.io_orientation(ct.affine)
    change = nibabel.orientations.ornt_transform(start, nibabel.orientations.axcodes2ornt(tuple(codes)))
    image = nibabel.Nifti1Image(hu, ct.affine).as_reoriented(change)
    mask = nibabel.Nifti1Image((labels + tumours.astype(int)).astype(np.uint8), ct.affine).as_reoriented(change)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), np.eye(4)), tmp_path / "volume-28.nii")
    nibabel.save(mask, tmp_path / "segmentation-28.nii")
    series = load(read_lits(tmp_path).items[0])
    assert series.warnings == ("AFFINE_REPAIRED",)
    assert series.volume.spacing_mm == pytest.approx((3, 3, 3))
    np.testing.assert_array_equal(series.volume.hu, hu[::-1, ::-1].T)
    found = np.stack([truth.mask for truth in series.truths if truth.mask is not None])
    assert round((found > 0).sum() * 27 / 1000) == 1126  # millilitres
    assert (found == 2).sum() == tumours.sum()
    boxes, names, _ = boxes_3d(series.truths)
    assert names.tolist() == [2, 2]
    assert sorted(boxes.tolist()) == sorted(expected)
