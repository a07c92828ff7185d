"""The closed list of reason codes: why a file or series was refused, and what was tolerated.

Codes are stable: they stand in manifests, reports and the endpoint's answers. Every :class:`~mp3d.errors.Refusal` of a
reader carries one of :data:`REASONS`, every warning of a series is one of :data:`WARNINGS`.
"""

REASONS: dict[str, str] = {
    # files
    "UNREADABLE": "The file cannot be opened or read. Check its permissions and the disk.",
    "NOT_DICOM": "No DICOM file. Take it out of the folder, or export it again.",
    "BAD_ARCHIVE": "A zip, or a file in it, is damaged, cut off, encrypted or oddly packed. Fetch it again.",
    "TRUNCATED": "The file ends too early. Copy or export it again.",
    "BAD_HEADER": "An element of the header cannot be parsed. Export the file again.",
    "TOO_LARGE": "Larger than any CT that is read here. Check rows, columns and number of slices.",
    "NOT_CT": "Another modality, or a secondary capture without Hounsfield units. Leave it out.",
    "MULTIFRAME_UNSUPPORTED": "Several frames in one file that is no Enhanced CT. Export one file per slice.",
    # pixels
    "NO_PIXELS": "The file has no Pixel Data (7FE0,0010). Export it with its pixels.",
    "PIXEL_LENGTH": "Pixel Data is shorter or longer than rows and columns ask for. Copy or export it again.",
    "BAD_PIXEL_FORMAT": "Pixels are not one sample of 16 bits, as CT stores them. Export the original CT images.",
    "UNSUPPORTED_TRANSFER_SYNTAX": "No decoder for it. Export uncompressed, RLE, JPEG lossless, JPEG-LS or JPEG 2000.",
    "DECODE_FAILED": "The compressed pixels are damaged. Copy or export the file again.",
    "DECODE_LIMIT": "Reading took more time or memory than one file may cost. Export it again or leave it out.",
    "DECODE_CRASHED": "Reading ended its worker process. Copy or export the file again.",
    "MISSING_RESCALE": "No Rescale Slope or Intercept, so no Hounsfield units. Export the original CT images.",
    "BAD_RESCALE": "Rescale Slope or Intercept is zero, not finite or absurd. Export the original CT images.",
    "NOT_HU": "The values are something other than Hounsfield units, such as a material map. Leave the series out.",
    # geometry
    "MISSING_GEOMETRY": "Position, orientation or pixel spacing is missing. Export the original CT images.",
    "BAD_GEOMETRY": "Position or orientation is not finite, or no pair of orthogonal unit vectors. Export it again.",
    "BAD_SPACING": "A spacing is not finite, not positive or absurd. Check the export or the image's header.",
    "LOCALIZER_ONLY": "Only localizer (scout) images. Choose the axial series.",
    "PROJECTION_ONLY": "Only projections, captures or dose sheets. Choose the axial series.",
    "MIXED_SERIES": "One Series Instance UID over several patients, studies or frames of reference. Tell them apart.",
    "MIXED_ORIENTATION": "Slices of several orientations in one series. Export each stack as a series of its own.",
    "MIXED_SIZE": "Slices of several sizes in one series. Export each stack as a series of its own.",
    "MIXED_SPACING": "Slices of several pixel spacings in one series. Export each stack as a series of its own.",
    "TOO_FEW_SLICES": "Too few slices to see that none is missing. Fetch the whole series.",
    "DUPLICATE_SLICE": "Different images at one position. Export each acquisition as a series of its own.",
    "MISSING_SLICE": "A gap: one or more slices are missing. Fetch the series again.",
    "UNEVEN_SPACING": "Slices are unevenly spaced. Export each stack as a series of its own, or set uneven = resample.",
    "GANTRY_TILT": "The stack is sheared by a tilted gantry. Set tilt = shear, or leave the series out.",
    "SHIFTED_SLICE": "A slice is shifted sideways. Export each reconstruction as a series of its own.",
    # volumes in other formats
    "BAD_IMAGE": "The image cannot be read, or its values are not finite. Write it again.",
    "NOT_3D": "No single 3D volume of one value per voxel. Write one volume per file.",
    "UNKNOWN_ORIENTATION": "The image does not say how it lies in the patient. Write it with its orientation.",
    # annotation
    "MISSING_MASK": "Not exactly one mask beside the image. Add or name it, or read the images without masks.",
    "MASK_MISMATCH": "The mask does not lie on the image's grid. Resample it onto the image.",
    "BAD_LABELS": "A mask holds values that no class name stands for. Name the classes, or clear the mask.",
    "SIZE_MISMATCH": "The picture has another size than its annotation. Use the pictures that were annotated.",
    "BAD_STRUCTURE_SET": "The RT Structure Set cannot be read. Export it again.",
    "BAD_ANNOTATION": "The annotation of this series cannot be read, or is not of it. Fetch it again.",
    "BAD_SEGMENTATION": "The DICOM SEG cannot be read. Export it again, as binary or fractional segments.",
    "CONTOUR_OFF_PLANE": "A contour does not lie on a slice of the volume. Draw or resample it on this series.",
    "BAD_BOX": "A row of the table of boxes cannot be used. Mend the line that the detail names.",
    "BOX_OFF_SLICE": "A row of the table of boxes names no slice of its series. Mend the line that the detail names.",
    # the program
    "READER_FAILED": "A defect of the reader, not of the data. Report it with its text.",
    "READER_OVERDUE": "Reading did not come to an end. Leave it out, or give more time and retry rejects.",
    "READER_CRASHED": "Reading ended its process again and again. Leave it out, or give more memory and retry rejects.",
}
"""Why a file or series is not used, and what to do."""

WARNINGS: dict[str, str] = {
    "LOCALIZER_DROPPED": "Localizer (scout) images inside the series were left out.",
    "PROJECTION_DROPPED": "Projections, captures or dose sheets inside the series were left out.",
    "DUPLICATE_DROPPED": "Slices that were stored twice with the same pixels were used once.",
    "BROKEN_FILE_DROPPED": "Broken files of this series, or beside it, were refused; the rest is a regular stack.",
    "MIXED_RECONSTRUCTION": "Slices of this stack differ in kernel, tube voltage, contrast agent, or in being derived.",
    "SPLIT_BY_ACQUISITION": "Several acquisitions or reconstructions of one range in one series were read as several.",
    "SPLIT_BY_SPACING": "One series with stacks of several spacings was read as several.",
    "TILT_CORRECTED": "The rows of a stack sheared by a tilted gantry were shifted back; rows were added, of air.",
    "UNEVEN_RESAMPLED": "Uneven slices were interpolated to their median spacing.",
    "SLICE_GAPS": "Slices are further apart than the header says, or than they are thick: every second may be missing.",
    "PADDING_TO_AIR": "Padding (Pixel Padding Value) above 3071 HU, or in more bits than are stored, was set to air.",
    "EMPTY_SERIES_UID": "No Series Instance UID: grouped by folder, frame of reference, size and orientation.",
    "UNKNOWN_PATIENT": "No Patient ID: the study, frame of reference or folder stands for the patient in splits.",
    "TILT_TAG_IGNORED": "Gantry/Detector Tilt is not zero, but the slices lie straight above one another.",
    "NOT_AXIAL": "The slices are nearer to coronal or sagittal than to axial.",
    "INTERVAL_UNKNOWN": "The table gives no slice interval: the key slice stands alone, without its neighbours.",
    "LOSSY_COMPRESSED": "Pixels were compressed with loss: HU are near the scanner's, and damage may not show.",
    "HU_CLIPPED": "Values beyond the range of 16-bit integers were clipped.",
    "AMBIGUOUS_NODULE": "Outlines of one reader, or of more than four, could not be told apart and are one nodule.",
    "MALIGNANCY_MISSING": "A reader did not rate a nodule's malignancy: the outlines count, and the others' ratings.",
    "SLICE_UID_MISSING": "A reader's outline does not name its image: the slice at its z was taken.",
    "UNSETTLED_SLICES": "Slices with marks, but no nodule that enough readers agree on, count as not searched.",
    "AFFINE_REPAIRED": "The image's header does not say its spacing; the segmentation's, or the given one, was taken.",
    "MASK_HEADER_IGNORED": "Image and mask disagree on directions or origin; the mask was laid voxel on voxel.",
    "ROI_NOT_FOUND": "No structure set or segmentation of the series has a matching region; it counts as not searched.",
    "CONTOUR_OUTSIDE_DROPPED": "Contours or segmented planes above or below the slices at hand were left out.",
    "BOX_CLIPPED": "A box reached beyond the image and was cut there.",
    "BOX_DROPPED": "A box without extent in the image was left out; an image left with none counts as not searched.",
}
"""What was tolerated in a series that is used."""


def as_markdown() -> str:
    """The list for users: ``docs/reasons.md``."""
    lines = [
        "# Reason codes",
        "",
        "Made by `python -m mp3d.data.reasons > docs/reasons.md`.",
        "",
        "## Refused",
        "",
        "Why a file or series is not used, and what to do. The detail beside the code in `manifest.json`, and in the",
        "endpoint's answer, names the slice, the DICOM tag, the value and the rule.",
        "",
        *_table(REASONS),
        "",
        "## Tolerated",
        "",
        "What was tolerated or corrected in a series that is used.",
        "",
        *_table(WARNINGS),
    ]
    return "\n".join(lines) + "\n"


def _table(codes: dict[str, str]) -> list[str]:
    return ["| code | meaning |", "|---|---|", *(f"| `{code}` | {meaning} |" for code, meaning in codes.items())]


if __name__ == "__main__":
    print(as_markdown(), end="")
