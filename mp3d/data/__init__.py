"""Data sets: one reader each, the shards they are stored in, and batches of clips for training."""

READERS = {
    "dicom": "mp3d.data.dicom_folder:read_dicom",
    "dicom_boxes": "mp3d.data.dicom_boxes:read_dicom_boxes",
    "volumes": "mp3d.data.volumes:read_volumes",
    "deeplesion": "mp3d.data.deeplesion:read_deeplesion",
    "deeplesion3d": "mp3d.data.deeplesion_3d:read_deeplesion_3d",
    "lidc": "mp3d.data.lidc:read_lidc",
    "lits": "mp3d.data.lits:read_lits",
    "coco": "mp3d.data.coco:read_coco",
    "pictures": "mp3d.data.pictures:read_picture_folders",
}
"""Data sets by their name on the command line, for ``pkgutil.resolve_name``, so that none is loaded unasked."""
