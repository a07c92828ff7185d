"""Command lines: recipes, near names, dry runs, exit codes, and where relative paths lie."""

import os
import sys
from pathlib import Path

import pytest

from jobs import finetune, pretrain, sweep
from mp3d import cli
from mp3d.config import AugmentConfig, SweepConfig, TrainConfig
from mp3d.errors import CheckpointError, ConfigError, DataError, ResourceError
from tests.tiny import ct_shards, detector_config


@pytest.mark.parametrize("job", [pretrain, finetune, sweep])
def test_help_lists_the_recipes_and_the_exit_codes(job, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        job.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "ray job submit --working-dir ." in said
    assert "exit codes: 0 done" in said
    assert "synthetic_" in said


def test_a_mistyped_recipe_is_answered_with_the_near_name():
    with pytest.raises(ConfigError, match="did you mean 'synthetic_finetune'"):
        finetune.main(["syntetic_finetune"])


def test_a_mistyped_field_is_answered_with_the_near_name(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["synthetic_finetune", "--optim.lrr", "0.1"])
    assert stop.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err.replace("--optim.lrr", "")


def test_a_dry_run_prints_the_plan_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MP3D_ROOT", str(tmp_path))
    assert finetune.main(["synthetic_finetune", "--dry-run", "--optim.lr", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "lr 0.5" in said
    assert str(tmp_path / "runs" / "synthetic_finetune") in said
    assert list(tmp_path.iterdir()) == []


def test_the_plan_has_the_rate_of_another_batch_than_the_stated_one(capsys: pytest.CaptureFixture[str]):
    assert finetune.main(["small_classification", "--dry-run"]) == 0
    assert "adam, lr 0.002, step" in capsys.readouterr().out
    assert finetune.main(["small_classification", "--optim.lr-batch", "16", "--dry-run"]) == 0
    assert "adam, lr 0.002 for 16 clips a step: 0.001 for 4, step" in capsys.readouterr().out


@pytest.mark.parametrize("preset", [["--augment.preset", "none"], ["--augment.preset=none"]])
def test_a_preset_on_the_command_line_sets_all_that_is_not_given_beside_it(preset: list[str]):
    def strong() -> TrainConfig:
        """Strong."""
        return detector_config(Path("ct"), Path("runs"), augment__preset="strong")

    given = [*preset, "--augment.horizontal-flip", "0.5", "--augment.image-sizes", "32"]
    command = cli.parse_recipe([strong], strong, about="", argv=given, build=lambda config: config)
    assert command.config.augment == AugmentConfig(preset="none", horizontal_flip=0.5, image_sizes=(32,))
    swept = cli.parse_recipe(
        [strong], strong, about="", argv=["--base.augment.preset", "flips"],
        build=lambda config: SweepConfig(name="s", base=config),
    )  # fmt: skip
    assert swept.config.base.augment == AugmentConfig(image_sizes=())


def test_without_a_recipe_the_default_is_taken_and_named(capsys: pytest.CaptureFixture[str]):
    assert pretrain.main(["--dry-run"]) == 0
    assert "no recipe was named: running 'synthetic_pretrain' on the synthetic world" in capsys.readouterr().out


def test_a_sweep_shows_its_space(capsys: pytest.CaptureFixture[str]):
    assert sweep.main(["synthetic_finetune", "--num-trials", "4", "--base.loop.epochs", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "anchor ratios" in said
    assert "given, fit" in said
    assert "anchors fitted to the shards" in said
    assert "2 epochs" in said


def test_a_run_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ct_shards(tmp_path / "ct")
    config = detector_config(tmp_path / "ct", tmp_path / "runs", loop__epochs=1, loop__steps_per_epoch=1)
    monkeypatch.setattr("mp3d.recipes.FINETUNE", (lambda: config,))
    assert cli.train_command(cli.Command(config, dry_run=False, default_recipe=False), "jobs/x.py {run}") == 0
    said = capsys.readouterr().out
    assert "best checkpoint: " in said
    assert f"next: python jobs/x.py {tmp_path / 'runs' / 'detector'}" in said


def test_what_is_wrong_is_told_before_the_cost_is_worked_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def told_late(config: TrainConfig) -> None:
        raise AssertionError

    monkeypatch.setattr(cli, "cost_plan", told_late)
    config = detector_config(tmp_path / "nowhere", tmp_path / "runs")
    with pytest.raises(DataError, match=r"run jobs/prepare\.py"):
        cli.train_command(cli.Command(config, dry_run=False, default_recipe=False), "jobs/x.py {run}")
    config = detector_config(ct_shards(tmp_path / "ct"), tmp_path / "runs", init_from=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        cli.train_command(cli.Command(config, dry_run=False, default_recipe=False), "jobs/x.py {run}")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("c"), 2),
        (DataError("d"), 3),
        (CheckpointError("k"), 3),
        (ResourceError("r"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_stops_a_job_is_one_line_and_an_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
):
    def main() -> int:
        raise error

    assert cli.run(main) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_of_the_output_that_has_gone_is_no_defect(monkeypatch: pytest.MonkeyPatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.run(lambda: print("plan", flush=True)) == 141


def test_a_configuration_error_names_the_field(capsys: pytest.CaptureFixture[str]):
    def main() -> int:
        TrainConfig(name="a", shards="s").override({"optim.lr": -1})
        return 0

    assert cli.run(main) == 2
    assert "optim.lr: Input should be greater than 0 (got -1)" in capsys.readouterr().err


def test_a_defect_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_relative_paths_lie_under_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MP3D_ROOT", str(tmp_path))
    assert cli.absolute("data/ct") == str(tmp_path / "data" / "ct")
    assert cli.absolute("/data/ct") == "/data/ct"
    assert cli.absolute("s3://bucket/ct") == "s3://bucket/ct"


def test_a_job_in_an_uploaded_folder_keeps_its_results_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unpacked = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    unpacked.mkdir(parents=True)
    monkeypatch.delenv("MP3D_ROOT", raising=False)
    monkeypatch.chdir(unpacked)
    assert cli.root() == Path.home() / "mp3d"
