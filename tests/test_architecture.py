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


PICKLERS = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "copyreg")
UNPICKLES_ITS_ARGUMENT = ("torch.load", "jit.load", "read_pickle", "package_importer", "PackageImporter")
RELEASED_WEIGHTS = "mp3d/released_worker.py"


def pickling(code: str) -> list[str]:
    """What in a module reads or writes pickles: imports of picklers, calls that unpickle, numpy's switch."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            found += [name for name in names if name.endswith(UNPICKLES_ITS_ARGUMENT)]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += [] if isinstance(node.value, ast.Constant) and node.value.value is False else ["allow_pickle"]
            continue
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("__import__", "import_module"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        found += [name for name in names if set(str(name).split(".")) & set(PICKLERS)]
        found += [name for name in names if str(name) in ("torch.load", "numpy.load")]
    return found


def test_nothing_is_unpickled():
    """But the authors' checkpoints, by a disposable process."""
    found = {str(path.relative_to(ROOT)): pickling(path.read_text()) for path in SOURCES}
    assert {path: what for path, what in found.items() if what and path != RELEASED_WEIGHTS} == {}
    assert "torch.load" in found[RELEASED_WEIGHTS]
    loads = [
        node
        for node in ast.walk(ast.parse((ROOT / RELEASED_WEIGHTS).read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [ast.unparse(keyword) for node in loads for keyword in node.keywords if keyword.arg == "weights_only"] == [
        "weights_only=True"
    ]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import joblib", "from ray import cloudpickle", "import marshal",
        "import torch\ntorch.load(path)", "from torch import load", "np.load(path, allow_pickle=True)", "import shelve",
        "torch.jit.load(path)", "pandas.read_pickle(path)", "__import__('dill')", "ray.cloudpickle.loads(b)",
        "numpy.load(path, allow_pickle=flag)",
    ],
)  # fmt: skip
def test_the_search_for_pickles_finds_them(code: str):
    assert pickling(code)


def test_the_search_for_pickles_finds_nothing_else():
    assert pickling("np.load(path, allow_pickle=False)\nload_file(path)\njson.loads(text)  # pickle") == []


def test_every_field_of_a_configuration_is_read_somewhere():
    code = "\n".join(path.read_text() for path in SOURCES if path.parent.name != "config")
    kinds = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, config.Config)]
    unread = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name in kind.model_fields
        if not re.search(rf"\.{name}\b|\"{name}\"", code)
    ]
    assert unread == []


def test_parsing_a_configuration_needs_no_torch():
    code = "import sys, mp3d.recipes; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("module", ["mp3d.train", "mp3d.predict", "mp3d.evaluation", "mp3d.report", "mp3d.data"])
def test_notebooks_need_no_ray(module: str):
    code = f"import sys, {module}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
