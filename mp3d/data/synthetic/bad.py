"""Files that a reader must refuse, each with its own reason."""

from pathlib import Path

import numpy as np

from mp3d.data.series import Volume
from mp3d.data.synthetic.ct import draw_ct
from mp3d.data.synthetic.dicom_files import write_ct_series, write_rtstruct


def write_bad_files(folder: Path) -> dict[str, Path]:
    """Write three series beside good ones, in the layout of :func:`~mp3d.data.synthetic.ct.write_ct_world`.

    Returns:
        The offending file of each: ``broken`` (random bytes), ``truncated`` (one CT slice of a complete series, cut
        within its pixels) and ``not_ct`` (one MR slice, whole).
    """
    rng = np.random.default_rng(0)
    broken = folder / "BAD-broken" / "CT" / "000001.dcm"
    broken.parent.mkdir(parents=True, exist_ok=True)
    broken.write_bytes(rng.bytes(4096))

    drawn = draw_ct(rng, size_px=64, num_slices=12)
    patient = folder / "BAD-truncated"
    slices = write_ct_series(patient / "CT", drawn.volume, patient.name, patient.name)
    write_rtstruct(patient / "RS.dcm", drawn.lesion_masks, drawn.volume, slices, patient.name)
    truncated = patient / "CT" / "000006.dcm"
    truncated.write_bytes(truncated.read_bytes()[:-4096])

    patient = folder / "BAD-not-ct"
    one_slice = Volume(drawn.volume.hu[:1], drawn.volume.affine)
    write_ct_series(patient / "CT", one_slice, patient.name, patient.name, modality="MR")
    return {"broken": broken, "truncated": truncated, "not_ct": patient / "CT" / "000001.dcm"}
