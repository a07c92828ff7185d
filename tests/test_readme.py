"""What the README says is so: its paths, commands, options, recipes and exit codes are those of the code."""

import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import evaluate, finetune, predict, prepare, pretrain, sweep
from mp3d import cli, convert
from mp3d.config import ClipConfig, EvaluateConfig, PredictConfig, ServeConfig
from mp3d.recipes import FINETUNE, PRETRAIN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FILE_NAME = re.compile(r"[\w./-]+\.(?:py|yaml|md|svg|toml)\b")
OTHER_PROGRAMS = {"--address", "--block", "--data-binary", "--disable-usage-stats", "--generate", "--head"} | {
    "--runtime-env-json",
    "--working-dir",
}
"""Options of ray and curl."""


def section(title: str) -> str:
    return re.split(r"^## ", README.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def shell_lines(text: str = README) -> list[list[str]]:
    """The commands of all shell blocks, as words."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def job_calls(text: str = README) -> list[tuple[str, list[str]]]:
    """Job and arguments of every `python jobs/...`, submitted or not."""
    calls = []
    for words in shell_lines(text):
        call = words[words.index("--") + 1 :] if words[:3] == ["ray", "job", "submit"] else words
        if call[0] == "python" and call[1].startswith("jobs/"):
            calls.append((Path(call[1]).stem, call[2:]))
    return calls


def parse(job: str, args: list[str]) -> None:
    """Go as far as the job goes without reading or starting anything."""
    match job:
        case "prepare":
            prepare.parse(args)
        case "evaluate":
            cli.parse(EvaluateConfig, about="", argv=args)
        case "predict":
            cli.parse(PredictConfig, about="", argv=args)
        case _:
            assert {"pretrain": pretrain, "finetune": finetune, "sweep": sweep}[job].main([*args, "--dry-run"]) == 0


@pytest.mark.parametrize(("job", "args"), job_calls())
def test_every_job_line_parses(job: str, args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MP3D_ROOT", str(tmp_path))
    parse(job, args)
    assert list(tmp_path.iterdir()) == []


def test_the_verbs_chain():
    """Each step reads what an earlier one has written."""
    written = {"data/synthetic/raw/pictures", "data/synthetic/raw/ct", "data/synthetic/raw/query"}
    steps = [call for call in job_calls(section("The verbs")) if call[1]]
    assert [job for job, _ in steps] == ["prepare", "prepare", "pretrain", "finetune", "sweep", "evaluate", "predict"]
    for _, args in steps:
        given = {name: value for name, value in zip(args, args[1:], strict=False) if name.startswith("--")}
        reads = ("--root", "--input", "--shards", "--init-from", "--base.shards", "--base.init-from", "--checkpoint")
        assert {given[name] for name in reads if name in given} <= written
        written.add(given.get("--out") or f"runs/{given['--name']}")
        if "--num-trials" in given:
            written.add(f"runs/{given['--name']}/best")
    (served,) = [words for words in shell_lines() if words[:3] == ["serve", "run", "serve.app:build"]]
    config = ServeConfig.model_validate(dict(word.split("=", 1) for word in served[3:]))
    assert config.checkpoint in written


def test_bare_submission_and_token_are_there():
    lines = [" ".join(words) for words in shell_lines(section("On a cluster"))]
    assert "ray job submit -- python jobs/pretrain.py" in lines
    assert "ray job submit --working-dir . -- python jobs/pretrain.py" in lines
    assert sum("RAY_AUTH_MODE=token" in line for line in lines) == 2
    assert any(line.startswith("ray start --head --block") for line in lines)


def test_every_option_exists(capsys: pytest.CaptureFixture[str]):
    calls: list[tuple[Callable, list[str]]] = [
        (prepare.main, ["--help"]),
        *((prepare.main, ["--out", "out", reader, "--help"]) for reader in prepare.READERS),
        (finetune.main, ["synthetic_finetune", "--help"]),
        (finetune.main, ["lidc_segmentation", "--help"]),
        (pretrain.main, ["vdt_imagenet_r3d18", "--help"]),
        (sweep.main, ["synthetic_finetune", "--help"]),
        (evaluate.main, ["--help"]),
        (predict.main, ["--help"]),
        (convert.main, ["--help"]),
    ]
    for main, args in calls:
        with pytest.raises(SystemExit):
            main(args)
    known = set(re.findall(r"--[a-z][a-z.-]*", capsys.readouterr().out)) | OTHER_PROGRAMS
    used = set(re.findall(r"(?<![\w`|-])--[a-z][a-z.-]*[a-z]|(?<=`)--[a-z][a-z.-]*[a-z]", README))
    assert used - known == set()


def tables_of_real_data() -> dict[str, list[str]]:
    """The cells behind each name of a reader or recipe."""
    rows = [row for row in section("Real data").splitlines() if row.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name: others for names, *others in cells for name in re.findall(r"`(\w+)`", names)}


def test_every_reader_has_a_line():
    recipes = {recipe.__name__ for recipe in (*PRETRAIN, *FINETUNE)}
    assert tables_of_real_data().keys() - recipes == prepare.READERS.keys()


def test_recipes_are_named_with_what_they_ask_for():
    recipes = {recipe.__name__: recipe() for recipe in (*PRETRAIN, *FINETUNE)}
    asked_for = {name: cells for name, cells in tables_of_real_data().items() if name not in prepare.READERS}
    named = {name: (gpus, cpus) for name, (_, gpus, cpus) in asked_for.items()}
    assert set(named) == {name for name in recipes if not name.startswith("synthetic")}
    for name, asked in named.items():
        launch, loop = recipes[name].launch, recipes[name].loop
        gpus = str(loop.num_workers) if launch.accelerator == "gpu" else "–"
        assert asked == (gpus, f"{launch.cpus_per_worker:g}"), name


def test_exit_codes_are_those_of_the_jobs():
    said = dict(re.findall(r"^\| (\d+) \| (.*?) \|$", section("Runs"), re.MULTILINE))
    true = {code: meaning.strip() for code, meaning in re.findall(r"(\d+) ([^·]+)", cli.EXIT_CODES)}
    assert said.keys() == true.keys()
    for code, meaning in true.items():
        assert said[code].startswith(meaning)


def mapped_files() -> Iterator[tuple[Path, Path]]:
    """Folder and path of every line of the file map."""
    (block,) = re.findall(r"(?:^    .*\n)+", section("File map"), re.MULTILINE)
    folders: list[Path] = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        folder = Path(*folders[:depth])
        yield folder, folder / name
        folders[depth:] = [Path(name)]
        for other in FILE_NAME.findall(line.strip().removeprefix(name)):
            within = folder / name / other if name.endswith("/") else folder / other
            yield folder, within if (ROOT / within).exists() else folder / other


def test_the_file_map_is_the_tree():
    paths = [path for _, path in mapped_files()]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for folder in ("mp3d", "jobs"):
        there = {path.relative_to(ROOT) for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"}
        assert there - set(paths) == set()
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "mp3d").glob("*/__init__.py")}
    assert packages - set(paths) == set()


def test_links_and_paths_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        text = (ROOT / path).read_text() if path else README
        headings = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        assert not anchor or anchor in headings
    for path in re.findall(r"`((?:mp3d|jobs|serve|cluster|docs)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z]+)(?=`| |$)", README, re.MULTILINE)) - {"and"} <= set(targets)


def test_clip_of_the_text_is_the_default():
    assert ClipConfig().num_slices == 9
    assert "nine neighbouring CT slices" in README


def test_the_figure_needs_nothing_but_itself():
    figure = ElementTree.parse(ROOT / "docs" / "method.svg")
    for element in figure.iter():
        assert not element.tag.endswith(("}image", "}script", "}foreignObject"))
        links = [value for name, value in element.attrib.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)
    names = {element.get("id") for element in figure.iter()}
    used = {element.get("href", "#")[1:] for element in figure.iter() if element.tag.endswith("}use")}
    assert used <= names


def test_options_may_stand_before_and_behind_the_reader() -> None:
    before, _ = prepare.parse(["--out", "out", "--runner", "local", "lidc", "--root", "r"])
    behind, reader = prepare.parse(["lidc", "--root", "r", "--runner", "local", "--out", "out"])
    assert before == behind
    assert reader.keywords["root"] == Path("r")
