"""Unpacks an uploaded zip in memory, trusting nothing in it.

Names inside the zip are never used, neither as paths nor in messages: an exported series often carries the patient's
name there. Archives inside the archive are files like any other; they are not opened.
"""

import io
import struct
import zipfile
import zlib

from mp3d.serving.schema import Rejected

DIRECTORY_BYTES_PER_FILE = 1024
"""Most bytes of the zip's directory for one file: 46, its name, its extra fields; no exporter comes near."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What every exporter writes. The decoders of the others allocate what the file tells them to."""
ENCRYPTED = 0x1 | 0x40
"""Flag bits of encryption and strong encryption."""
CHUNK_BYTES = 2**20
DAMAGE = (
    zipfile.BadZipFile,
    NotImplementedError,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    OSError,
    OverflowError,
)
"""What ``zipfile`` raises on damaged input."""


def unpack(body: bytes, *, max_files: int, max_bytes: int) -> dict[str, bytes]:
    """The files of a zip, by their number in it (``file 1``, ``file 2``, ...); folders and empty files are left out.

    Args:
        max_files: most files, counted before any is inflated.
        max_bytes: most bytes of all files together, as declared and as inflated.

    Raises:
        Rejected: no zip, damaged, encrypted, empty, over a limit, or with a name that stands twice.
    """
    if not body:
        raise Rejected("EMPTY_BODY", "the request has no body; send a zip of one CT series as the body")
    try:
        with zipfile.ZipFile(_BoundedFile(body, max_files * DIRECTORY_BYTES_PER_FILE)) as archive:
            return _read(archive, _checked(archive, max_files, max_bytes), max_bytes)
    except zipfile.BadZipFile as error:
        if body.startswith(b"PK"):
            raise Rejected("ZIP_DAMAGED", "the zip is damaged or cut off; send it again") from error
        raise Rejected("NOT_A_ZIP", "the body is no zip; send the zip itself, neither a form nor base64") from error
    except DAMAGE as error:
        raise Rejected("ZIP_DAMAGED", "the zip is damaged or cut off; send it again") from error


class _BoundedFile(io.BytesIO):
    """The zip's bytes; refuses the one long read of ``zipfile``: the directory, as long as the zip says it is."""

    def __init__(self, body: bytes, longest_read: int) -> None:
        super().__init__(body)
        self.longest_read = max(longest_read, CHUNK_BYTES)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.longest_read:
            raise Rejected(
                "TOO_MANY_FILES", f"the directory of the zip has {size} bytes, {self.longest_read} are allowed"
            )
        return super().read(size)


def _checked(archive: zipfile.ZipFile, max_files: int, max_bytes: int) -> list[zipfile.ZipInfo]:
    """The files to inflate, after every check that needs only the directory."""
    files = [info for info in archive.infolist() if not info.filename.endswith("/")]
    if not files:
        raise Rejected("ZIP_EMPTY", "the zip holds no file; send the DICOM files of one CT series")
    if len(files) > max_files:
        raise Rejected("TOO_MANY_FILES", f"the zip holds {len(files)} files, {max_files} are allowed; send one series")
    if len({info.filename for info in files}) < len(files):
        raise Rejected("ZIP_DUPLICATE_NAME", "the zip holds two files of the same name; zip the series again")
    declared = sum(info.file_size for info in files)
    if declared > max_bytes:
        raise Rejected("UNPACKED_TOO_LARGE", f"the files have {declared} bytes together, {max_bytes} are allowed")
    for number, info in enumerate(files, 1):
        if info.flag_bits & ENCRYPTED:
            raise Rejected("ZIP_ENCRYPTED", f"file {number} of the zip is encrypted; send it without a password")
        if info.compress_type not in METHODS:
            raise Rejected(
                "ZIP_COMPRESSION", f"file {number} has compression method {info.compress_type}; use deflate or none"
            )
    return files


def _read(archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo], max_bytes: int) -> dict[str, bytes]:
    files = {}
    left = max_bytes
    for number, info in enumerate(infos, 1):
        content = bytearray()
        with archive.open(info) as member:
            while chunk := member.read(CHUNK_BYTES):
                left -= len(chunk)
                if left < 0:
                    raise Rejected("UNPACKED_TOO_LARGE", f"the files have more than {max_bytes} bytes together")
                content += chunk
        if content:
            files[f"file {number}"] = bytes(content)
    if not files:
        raise Rejected("ZIP_EMPTY", "every file of the zip is empty; send the DICOM files of one CT series")
    return files
