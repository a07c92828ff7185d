"""The synthetic world, written and prepared: what a job trains on when nobody named a data set."""

from pathlib import Path

from mp3d.data.dicom_folder import read_dicom
from mp3d.data.id_key import load_id_key
from mp3d.data.pictures import read_picture_folders
from mp3d.data.prepare import prepare
from mp3d.data.shard import MANIFEST
from mp3d.data.synthetic import write_ct_world, write_picture_world

NUM_PATIENTS = 96
PICTURES_PER_CLASS = 240
SEED = 20


def write_synthetic_world(raw: Path) -> None:
    """Write ``raw/ct``, ``raw/pictures`` and ``raw/query`` once; the query is a patient of another seed."""
    complete = raw / ".complete"
    if complete.exists():
        return
    print(f"writing a synthetic world into {raw}: {NUM_PATIENTS} outlined CT series, colour pictures", flush=True)
    write_ct_world(raw / "ct", num_patients=NUM_PATIENTS, seed=SEED)
    write_ct_world(raw / "query", num_patients=1, seed=SEED + 1)
    write_picture_world(raw / "pictures", num_per_class=PICTURES_PER_CLASS, seed=SEED)
    complete.touch()


def ensure_synthetic_shards(root: Path) -> None:
    """Write the world and prepare ``root/ct`` and ``root/pictures`` from it, unless they stand already."""
    if (root / "ct" / MANIFEST).exists() and (root / "pictures" / MANIFEST).exists():
        return
    write_synthetic_world(root / "raw")
    prepare(read_dicom(root / "raw" / "ct"), root / "ct", id_key=load_id_key(), runner="local", items_per_part=4)
    pictures = read_picture_folders(root / "raw" / "pictures")
    prepare(pictures, root / "pictures", id_key=load_id_key(), runner="local")
