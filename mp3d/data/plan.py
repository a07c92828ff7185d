"""What a folder of shards is to hold: the plan that is written there first and that every later run must repeat."""

import fcntl
import json
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

from mp3d.data.shard import ASIDE_PATTERN, FORMAT_VERSION, hashed_id, is_disk_full, json_text, write_once
from mp3d.data.source import Source
from mp3d.errors import ConfigError

PLAN = "plan.json"


def make_plan(source: Source, id_key: bytes, rule: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the content of the shards; names and the key stand in it as keyed hashes only."""
    items = blake2b(key=id_key, digest_size=16)
    for item in source.items:
        items.update(_text([item.key, item.patient, item.split, *item.members]))
    for key, refusal in source.refused:
        items.update(_text([key, refusal.reason, refusal.detail]))
    return {
        "format_version": FORMAT_VERSION,
        "dataset": source.dataset,
        "reader": source.reader,
        "reader_options": dict(source.options),
        "class_names": list(source.class_names),
        "id_key": hashed_id("which key", id_key),
        "num_items": len(source.items),
        **rule,
        "items": items.hexdigest(),
    }


def claim(out: Path, plan: dict[str, Any]) -> TextIO:
    """Write the plan into a new folder, or check that the folder was begun with the same one.

    Returns:
        An open file; while it stays open no other run gets the folder.

    Raises:
        ConfigError: the folder cannot be made, holds something else, was begun with another plan, or is being prepared.
        OSError: the disk is full.
    """
    path = out / PLAN
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = sorted(child.name for child in out.iterdir() if not child.match(ASIDE_PATTERN))
        if foreign and PLAN not in foreign:
            raise ConfigError(f"{out} holds {foreign[0]}, but no {PLAN}; choose a new folder for the shards")
        if not foreign:
            write_once(path, json_text(plan))  # of two runs that begin at once, both lock the file of one
        file = path.open("r+")
    except OSError as error:
        if is_disk_full(error):
            raise
        raise ConfigError(f"{out} cannot be made or written: {error}") from error
    try:
        _lock(file, out)
        _compare(out, file.read(), plan)
    except BaseException:
        file.close()
        raise
    for left_over in out.glob(ASIDE_PATTERN):
        left_over.unlink(missing_ok=True)
    return file


def _lock(file: TextIO, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{out} is being prepared by another run; wait for it, or choose another folder") from None
    except OSError:
        pass  # a file system without locks: there the user must take care


def _compare(out: Path, text: str, plan: dict[str, Any]) -> None:
    try:
        begun = json.loads(text)
        differences = [name for name in plan if begun[name] != plan[name]]
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{out / PLAN} is damaged; delete the folder, or choose another") from None
    if differences:
        # another key or number of items changes the digest of the items too, which then says nothing of its own
        telling = [name for name in differences if name != "items"] or differences
        told = "; ".join(_told(name, begun[name], plan[name]) for name in telling)
        raise ConfigError(f"{out} was begun with another plan: {told}. Choose another folder, or delete this one")


def _told(name: str, begun: Any, asked: Any) -> str:
    match name:
        case "items":
            return "other files, patients or splits"
        case "id_key":
            return "another id key"
        case "reader_options" if isinstance(begun, dict):
            changed = (key for key in begun.keys() | asked.keys() if begun.get(key) != asked.get(key))
            return "; ".join(_told(key, begun.get(key), asked.get(key)) for key in sorted(changed))
        case _:
            return f"{name} {begun} there, {asked} now"


def _text(values: list[str | None]) -> bytes:
    return json.dumps(values).encode() + b"\n"
