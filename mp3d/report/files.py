"""What a report leaves in its folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp3d.data.shard import write_aside


@dataclass(frozen=True)
class ReportFiles:
    """
    Attributes:
        page: the HTML page, which needs nothing beside it.
        pictures: its main figures as PNG files, by name.
        numbers: the headline numbers by name, as a tracker takes them; undefined ones are left out.
    """

    page: Path
    pictures: dict[str, Path]
    numbers: dict[str, float]


def write_files(
    page: Path, html: str, figures: Mapping[str, bytes], content: Mapping[str, Any], numbers: Mapping[str, float]
) -> ReportFiles:
    """The page, each figure as ``<name>.png``, and the content as ``metrics.json``."""
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, png in figures.items():
        pictures[name] = page.parent / f"{name}.png"
        pictures[name].write_bytes(png)
    write_aside(page.parent / "metrics.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_aside(page, html)
    return ReportFiles(page, pictures, {name: value for name, value in numbers.items() if value == value})
