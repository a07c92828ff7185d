"""Data sets: one reader each, the shards they are stored in, and batches of clips for training."""

READERS = {
    "dicom": "mp3d.data.dicom_folder:read_dicom",
    "dicom_boxes": "mp3d.data.dicom_boxes:read_dicom_boxes",
    "nifti": "mp3d.data.nifti:read_nifti",
    "deeplesion": "mp3d.data.deeplesion:read_deeplesion",
    "coco": "mp3d.data.coco:read_coco",
    "pictures": "mp3d.data.pictures:read_picture_folders",
}
"""Data sets by their name on the command line, for ``pkgutil.resolve_name``, so that none is loaded unasked."""
