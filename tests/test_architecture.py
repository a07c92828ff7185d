"""Rules of the house that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mp3d import config

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("mp3d", "jobs", "serve") for path in (ROOT / folder).rglob("*.py"))
ARCHITECTURE_OF_IMPORTS = "lint-imports"


def test_imports_point_one_way():
    tool = Path(sys.executable).with_name(ARCHITECTURE_OF_IMPORTS)
    done = subprocess.run([str(tool)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(path: Path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "common", "misc"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_for(path: Path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_nothing_is_unpickled():
    """But the authors' checkpoints, by a disposable process; Ray's own transport of a task is the one use of its
    pickler.
    """
    found = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if re.search(r"\bpickle\.loads?\(|torch\.load\(|allow_pickle=True|joblib", path.read_text())
    }
    assert found - {"mp3d/data/part.py", "mp3d/released_worker.py"} == set()


def test_every_field_of_a_configuration_is_read_somewhere():
    code = "\n".join(path.read_text() for path in SOURCES if path.parent.name != "config")
    kinds = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, config.Config)]
    unread = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name in kind.model_fields
        if not re.search(rf"\.{name}\b|\"{name}\"", code)
    ]
    assert unread == ["AugmentConfig.preset"], "which the configuration itself puts into other fields"


def test_parsing_a_configuration_needs_no_torch():
    code = "import sys, mp3d.recipes; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("module", ["mp3d.train", "mp3d.predict", "mp3d.evaluation", "mp3d.report", "mp3d.data"])
def test_notebooks_need_no_ray(module: str):
    code = f"import sys, {module}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
