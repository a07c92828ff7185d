"""Zips that a stranger may send."""

import io
import struct
import time
import zipfile

import numpy as np
import pytest

from mp3d.serving.archive import CHUNK_BYTES, unpack
from mp3d.serving.schema import STATUS, Rejected

MB = 2**20
LIMITS = {"max_files": 100, "max_bytes": 4 * MB}


def make_zip(*files: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def random_bytes(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def patched(body: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite a field of the last local header, directory entry or end record."""
    at = body.rindex(signature) + offset
    return body[:at] + value + body[at + len(value) :]


LOCAL, DIRECTORY, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def encrypted() -> bytes:
    body = make_zip(("a", b"secret"))
    return patched(patched(body, LOCAL, 6, b"\x01\x00"), DIRECTORY, 8, b"\x01\x00")


def with_method(method: int) -> bytes:
    body = make_zip(("a", b"content"))
    value = struct.pack("<H", method)
    return patched(patched(body, LOCAL, 8, value), DIRECTORY, 10, value)


def overlapping() -> bytes:
    """Many directory entries that point to one local file: a small zip that declares much."""
    kernel = make_zip(("a", bytes(MB)))
    start, end = kernel.index(DIRECTORY), kernel.index(END)
    entry = kernel[start:end]
    count = 50
    names = b"".join(entry[:-1] + bytes([ord("A") + number]) for number in range(count))
    tail = struct.pack("<4s4H2LH", END, 0, 0, count, count, len(names), start, 0)
    return kernel[:start] + names + tail


def understated() -> bytes:
    """Declares fewer bytes than it inflates to."""
    body = make_zip(("a", bytes(8 * MB)))
    return patched(patched(body, LOCAL, 22, struct.pack("<L", 100)), DIRECTORY, 24, struct.pack("<L", 100))


def duplicate_names() -> bytes:
    return make_zip(("a", b"one"), ("b", b"two")).replace(b"b", b"a")


def long_directory() -> bytes:
    """An end record that declares a directory of 200 MiB, and brings it."""
    body = make_zip(("a", b"x"))
    start, end = body.index(DIRECTORY), body.index(END)
    directory = body[start:end] * (8 * MB // (end - start))
    tail = struct.pack("<4s4H2LH", END, 0, 0, 0xFFFE, 0xFFFE, len(directory), start, 0)
    return body[:start] + directory + tail


SYMLINK = zipfile.ZipInfo("link")
SYMLINK.external_attr = 0o120777 << 16

NASTY = {
    "no body": (b"", "EMPTY_BODY"),
    "text": (b"this is no zip", "NOT_A_ZIP"),
    "one byte": (b"P", "NOT_A_ZIP"),
    "gzip": (b"\x1f\x8b\x08\x00" + random_bytes(200), "NOT_A_ZIP"),
    "noise": (random_bytes(100_000), "NOT_A_ZIP"),
    "cut in half": (make_zip(("a", random_bytes(50_000)))[:25_000], "ZIP_DAMAGED"),
    "signature alone": (LOCAL, "ZIP_DAMAGED"),
    "end record cut": (make_zip(("a", b"x"))[:-3], "ZIP_DAMAGED"),
    "empty": (make_zip(), "ZIP_EMPTY"),
    "folders alone": (make_zip(("folder/", b""), ("folder/sub/", b"")), "ZIP_EMPTY"),
    "empty files alone": (make_zip(("a", b""), ("b", b"")), "ZIP_EMPTY"),
    "encrypted": (encrypted(), "ZIP_ENCRYPTED"),
    "bzip2": (make_zip(("a", b"x" * 100), method=zipfile.ZIP_BZIP2), "ZIP_COMPRESSION"),
    "lzma": (make_zip(("a", b"x" * 100), method=zipfile.ZIP_LZMA), "ZIP_COMPRESSION"),
    "deflate64": (with_method(9), "ZIP_COMPRESSION"),
    "unknown method": (with_method(77), "ZIP_COMPRESSION"),
    "wrong checksum": (patched(make_zip(("a", b"x" * 100)), DIRECTORY, 16, b"\0\0\0\1"), "ZIP_DAMAGED"),
    "damaged deflate stream": (
        patched(make_zip(("a", random_bytes(1000))), LOCAL, 31, b"\xff" * 50),
        "ZIP_DAMAGED",
    ),
    "local name differs": (patched(make_zip(("a", b"x")), LOCAL, 30, b"z"), "ZIP_DAMAGED"),
    "directory points beyond the end": (patched(make_zip(("a", b"x")), END, 16, b"\xff\xff\xff\x7f"), "ZIP_DAMAGED"),
    "local header beyond the end": (patched(make_zip(("a", b"x")), DIRECTORY, 42, b"\xff\xff\xff\x7f"), "ZIP_DAMAGED"),
    "duplicate names": (duplicate_names(), "ZIP_DUPLICATE_NAME"),
    "too many files": (make_zip(*((str(i), b"x") for i in range(101))), "TOO_MANY_FILES"),
    "a hundred thousand entries": (long_directory(), "TOO_MANY_FILES"),
    "flat bomb": (make_zip(("a", bytes(64 * MB))), "UNPACKED_TOO_LARGE"),
    "many small ones": (make_zip(*((str(i), bytes(MB)) for i in range(5))), "UNPACKED_TOO_LARGE"),
    "overlapping bomb": (overlapping(), "UNPACKED_TOO_LARGE"),
    "declares less than it inflates to": (understated(), "ZIP_DAMAGED"),
}


@pytest.mark.parametrize(("body", "reason"), NASTY.values(), ids=NASTY.keys())
def test_nasty_zip_is_refused(body: bytes, reason: str):
    started = time.perf_counter()
    with pytest.raises(Rejected) as refused:
        unpack(body, **LIMITS)
    assert refused.value.reason == reason
    assert 400 <= refused.value.status < 500
    assert reason in STATUS
    assert time.perf_counter() - started < 1


def test_good_zip_is_unpacked_by_number():
    one, two = random_bytes(3 * CHUNK_BYTES // 2), b"two"
    body = make_zip(("DOE^JANE/1.dcm", one), ("DOE^JANE/", b""), ("DOE^JANE/empty", b""), ("DOE^JANE/2.dcm", two))
    files = unpack(body, **LIMITS)
    assert list(files.values()) == [one, two]
    assert not any("DOE" in name for name in files)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "C:\\Windows\\x", "a\x00b", "..", "名前/1.dcm"])
def test_names_are_never_used(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = unpack(make_zip((name, b"content")), **LIMITS)
    assert list(files.values()) == [b"content"]
    assert all(name not in key for key in files)
    assert not list(tmp_path.iterdir())


def test_symbolic_link_is_a_small_file():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(SYMLINK, "/etc/passwd")
    assert list(unpack(buffer.getvalue(), **LIMITS).values()) == [b"/etc/passwd"]


def test_zip_inside_is_not_opened():
    inner = make_zip(("bomb", bytes(64 * MB)))
    assert list(unpack(make_zip(("inner.zip", inner)), **LIMITS).values()) == [inner]


def test_zip64_is_read():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, archive.open("a", "w", force_zip64=True) as member:
        member.write(b"content")
    assert list(unpack(buffer.getvalue(), **LIMITS).values()) == [b"content"]


def test_limits_are_inclusive():
    body = make_zip(*((str(i), bytes(1000)) for i in range(10)))
    assert len(unpack(body, max_files=10, max_bytes=10_000)) == 10
    with pytest.raises(Rejected, match="TOO_MANY_FILES"):
        unpack(body, max_files=9, max_bytes=10_000)
    with pytest.raises(Rejected, match="UNPACKED_TOO_LARGE"):
        unpack(body, max_files=10, max_bytes=9_999)


def test_mutated_zips_are_read_or_refused():
    """Whatever ``zipfile`` runs into, it is a refusal; a zip that is still read holds what was put in."""
    files = [random_bytes(400, seed) for seed in range(3)]
    body = make_zip(*((f"{index}.dcm", content) for index, content in enumerate(files)))
    rng = np.random.default_rng(7)
    reasons = set()
    for _ in range(3000):
        broken = bytearray(body)
        for at in rng.integers(len(body), size=rng.integers(1, 6)):
            broken[at] = rng.integers(256)
        try:
            unpacked = unpack(bytes(broken), **LIMITS)
        except Rejected as error:
            reasons.add(error.reason)
        else:
            assert set(unpacked.values()) <= set(files)
    assert {"ZIP_DAMAGED", "ZIP_ENCRYPTED", "ZIP_COMPRESSION"} <= reasons <= set(STATUS)
