"""What the pages share: their templates and style, numbers as readers see them, pictures inlined."""

import json
import math
from base64 import b64encode
from collections.abc import Mapping
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup


def template(name: str) -> Template:
    """A page of this folder; what it is given is escaped, and a name it is not given is an error."""
    folder = files("mp3d.report")
    environment = Environment(
        loader=PackageLoader("mp3d", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["fraction"] = "{:.3f}".format
    environment.filters["score"] = _score
    environment.filters["signed"] = lambda value: signed(value, "+.3f")
    environment.filters["short"] = _short
    environment.filters["interval"] = _interval
    environment.filters["count"] = lambda value: f"{value:,}".replace(",", " ")
    environment.globals["style"] = Markup((folder / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(name)


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + b64encode(png).decode()


def signed(value: float, spec: str = "") -> str:
    """With a minus sign instead of a hyphen."""
    return format(value, spec).replace("-", "−")


def split_config(provenance: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """Provenance without the configuration, and that as indented text."""
    facts = dict(provenance)
    config = facts.pop("config", None)
    return facts, None if config is None else json.dumps(json.loads(config), indent=2)


def _interval(spread: tuple[float, float]) -> str:
    low, high = spread
    if math.isnan(low):
        return "–"
    between = " to " if low < 0 else "–"
    return f"{signed(low, '.3f')}{between}{signed(high, '.3f')}"


def _score(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else "< 0.001"


def _short(value: float) -> str:
    """Four digits that count, whole numbers as they are."""
    text = f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return text.replace("-", "−")
