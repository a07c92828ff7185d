"""Starting runs: claiming a name, asking the cluster first, Ray Train and Ray Tune at work. One Ray for all of it."""

import json
import os
import time
from pathlib import Path

import pytest

from mp3d.checkpoint import open_checkpoint
from mp3d.config import SweepConfig
from mp3d.errors import ConfigError, DataError, ResourceError
from mp3d.launch import check_resources, fits, run_training
from mp3d.run_folder import claim, read_metrics
from mp3d.sweep import run_sweep, trials_table
from tests.tiny import ct_shards, detector_config


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct_shards(tmp_path_factory.mktemp("ct") / "shards")


def test_a_name_stands_for_one_configuration(tmp_path: Path):
    config = detector_config(tmp_path, tmp_path)
    claim(tmp_path / "run", config)
    claim(tmp_path / "run", config.override({"launch.cpus_per_worker": 4, "launch.runner": "ray"}))
    with pytest.raises(ConfigError, match=r"model\.width was 0\.125, is 0\.5.*another --name"):
        claim(tmp_path / "run", config.override({"model.width": 0.5}))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["name"] == "detector"


def test_several_workers_need_ray(ct: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="is one process"):
        run_training(detector_config(ct, tmp_path, loop__num_workers=2))


@pytest.mark.ray
def test_what_the_cluster_lacks_is_said_at_once(ray_cluster: None):
    check_resources([{"CPU": 1}] * 2)
    with pytest.raises(ResourceError, match=r"1 worker\(s\) with 1 CPU, 1 GPU in all; the cluster has 2 CPU, 0 GPU"):
        check_resources([{"CPU": 1, "GPU": 1}])
    started = time.monotonic()
    with pytest.raises(ResourceError, match="64 CPU"):
        check_resources([{"CPU": 32}] * 2, wait_s=1)
    assert time.monotonic() - started > 1


@pytest.mark.parametrize(
    ("bundles", "nodes", "expected"),
    [
        ([{"CPU": 4}] * 2, [{"CPU": 4}, {"CPU": 4}], True),
        ([{"CPU": 6}], [{"CPU": 4}, {"CPU": 4}], False),
        ([{"CPU": 1}, {"CPU": 1, "GPU": 1}], [{"CPU": 1, "GPU": 1}, {"CPU": 1}], True),
        ([{"CPU": 1, "GPU": 1}] * 2, [{"CPU": 8, "GPU": 1}], False),
        ([{"CPU": 0.5}] * 4, [{"CPU": 2}], True),
    ],
)
def test_a_worker_lies_on_one_node(bundles: list[dict], nodes: list[dict], expected: bool):
    assert fits(bundles, nodes) == expected


@pytest.mark.ray
def test_a_task_that_asked_for_no_gpu_sees_none(ray_cluster: None):
    import ray

    task = ray.remote(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert ray.get(task.remote()) == ""


@pytest.mark.ray
def test_a_gpu_that_is_not_there_is_refused_before_the_run_exists(ray_cluster: None, ct: Path, tmp_path: Path):
    with pytest.raises(ResourceError, match="GPU"):
        run_training(detector_config(ct, tmp_path, launch__runner="ray", launch__accelerator="gpu"))
    assert not (tmp_path / "detector").exists()


@pytest.mark.ray
def test_two_ray_train_workers_train_and_a_plain_process_goes_on(ray_cluster: None, ct: Path, tmp_path: Path):
    config = detector_config(ct, tmp_path, launch__runner="ray", loop__num_workers=2, loop__batch_size=1)
    run = run_training(config)
    assert [line["epoch"] for line in read_metrics(run)] == [1, 2]
    assert open_checkpoint(run).config.loop.num_workers == 2


@pytest.mark.ray
def test_an_error_in_a_worker_arrives_as_it_was_raised(ray_cluster: None, ct: Path, tmp_path: Path):
    config = detector_config(ct, tmp_path, launch__runner="ray", launch__max_failures=0)
    for part in ct.glob("part-*.parquet"):
        part.rename(part.with_suffix(".away"))
    try:
        with pytest.raises(DataError, match="prepare"):
            run_training(config)
    finally:
        for part in ct.glob("part-*.away"):
            part.rename(part.with_suffix(".parquet"))


@pytest.mark.ray
def test_a_sweep_stops_the_worse_and_exports_the_best(ray_cluster: None, ct: Path, tmp_path: Path):
    sweep = SweepConfig(
        name="search",
        base=detector_config(ct, tmp_path, loop__epochs=4, loop__steps_per_epoch=20),
        num_trials=4,
        lr=(2.5e-3, 3.5e-3),
        anchor_ratios=((9.0,), (1.0,)),  # no lesion is nine times as high as it is wide
        anchors=("given",),
        frozen_stages=(-1, 0),
        grace_epochs=2,
        reduction_factor=2,
        max_concurrent=1,
        seed=1,
    )
    best = run_sweep(sweep)
    trials = json.loads((tmp_path / "search" / "trials.json").read_text())
    assert len(trials) == 4
    assert any(trial["stopped_early"] for trial in trials)
    assert open_checkpoint(best).score == max(trial["best_score"] for trial in trials)
    assert trials[0]["trial"] in trials_table(tmp_path / "search").splitlines()[1]
    assert run_sweep(sweep) == best, "a finished sweep is not run again"
    with pytest.raises(ConfigError, match="num_trials was 4, is 5"):
        run_sweep(sweep.override({"num_trials": 5}))
