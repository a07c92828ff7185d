"""The list of reason codes is closed: every refusal in the readers uses one of it, and every code is used."""

import ast
from pathlib import Path

import mp3d.data
from mp3d.data.reasons import REASONS, WARNINGS, as_markdown

FOLDER = Path(mp3d.data.__path__[0])


def refusal_codes() -> dict[str, str]:
    """Code to where it is raised."""
    codes: dict[str, str] = {}
    for path in sorted(FOLDER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal":
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    codes[str(first.value)] = f"{path.name}:{node.lineno}"
    return codes


def texts() -> str:
    return "\n".join(path.read_text() for path in FOLDER.rglob("*.py") if path.name != "reasons.py")


def test_every_refusal_has_a_listed_code() -> None:
    codes = refusal_codes()
    assert len(codes) > 30
    assert {code: where for code, where in codes.items() if code not in REASONS} == {}


def test_every_listed_code_is_used() -> None:
    unused = [code for code in [*REASONS, *WARNINGS] if f'"{code}"' not in texts()]
    assert unused == []


def test_each_says_what_and_what_to_do() -> None:
    for code, meaning in (REASONS | WARNINGS).items():
        assert code == code.upper()
        assert meaning.endswith(".")
    assert all(meaning.count(". ") >= 1 for meaning in REASONS.values())
    assert not REASONS.keys() & WARNINGS.keys()


def test_the_document_is_up_to_date() -> None:
    document = Path(__file__).parents[1] / "docs" / "reasons.md"
    assert document.read_text() == as_markdown(), "python -m mp3d.data.reasons > docs/reasons.md"
