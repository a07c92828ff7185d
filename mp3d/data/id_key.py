"""The secret behind the keyed hashes of patients, studies and series."""

import os
from pathlib import Path
from secrets import token_bytes, token_hex

from mp3d.errors import ConfigError

KEY_BYTES = 32
ENVIRONMENT_VARIABLE = "MP3D_ID_KEY_FILE"


def id_key_path(path: Path | None) -> Path:
    """The file that :func:`load_id_key` uses."""
    if path is not None:
        return path
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if named else Path.home() / ".config" / "mp3d" / "id_key"


def load_id_key(path: Path | None = None) -> bytes:
    """The 32 random bytes that key the hashes, made on first use.

    They stand, as 64 hexadecimal digits, in ``path``, else in the file that ``$MP3D_ID_KEY_FILE`` names, else in
    ``~/.config/mp3d/id_key``. With the same key a patient has the same id in every data set; without it nobody can find
    out by trying whether a known patient is in a data set. Keep it as you keep the images. A new file is readable by
    its owner only; of several programs that start at once one makes it and all use it.

    Raises:
        ConfigError: the file cannot be read or made, or holds something else.
    """
    path = id_key_path(path)
    try:
        if not path.exists():
            _create(path)
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the id key {path} cannot be read or made: {error}; choose --id-key-file") from error
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{path} is no id key: it must hold {2 * KEY_BYTES} hexadecimal digits; choose --id-key-file")
    return key


def _create(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{token_hex(4)}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(token_bytes(KEY_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, it never replaces the key that another process made meanwhile
        except FileExistsError:
            return
    finally:
        temporary.unlink()
