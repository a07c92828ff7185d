"""Data sets: one reader each, the shards they are stored in, and batches of clips for training."""

READERS = {
    "dicom": "mp3d.data.dicom_folder:read_dicom",
    "volumes": "mp3d.data.volumes:read_volumes",
    "deeplesion": "mp3d.data.deeplesion:read_deeplesion",
    "lidc": "mp3d.data.lidc:read_lidc",
    "deeplesion3d": "mp3d.data.deeplesion_3d:read_deeplesion_3d",
    "lits": "mp3d.data.lits:read_lits",
    "pictures": "mp3d.data.pictures:read_picture_folders",
}
"""Data sets by their name on the command line, for ``pkgutil.resolve_name``, so that none is loaded unasked."""
