"""What a report leaves in its folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    (page.parent / "metrics.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    page.write_text(html, encoding="utf-8")
    return ReportFiles(page, pictures, {name: value for name, value in numbers.items() if value == value})
