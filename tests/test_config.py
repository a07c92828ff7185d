"""Configurations: overriding, round trips, and errors that name the field."""

import pytest
from pydantic import ValidationError

from mp3d.config import ClipConfig, DetectionHead, SweepConfig, TrainConfig
from mp3d.errors import ConfigError


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig(name="a", shards="shards")


def test_json_round_trip(config: TrainConfig):
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_override_replaces_dotted_fields_and_nothing_else(config: TrainConfig):
    changed = config.override({"optim.lr": 0.5, "model.head.anchor_ratios": [1, 2]})
    assert changed.optim.lr == 0.5
    assert isinstance(changed.model.head, DetectionHead)
    assert changed.model.head.anchor_ratios == (1.0, 2.0)
    assert changed.clip == config.clip
    assert config.optim.lr == 0.02


@pytest.mark.parametrize("path", ["optim.lrr", "optimm.lr", "optim.lr.x", "nothing"])
def test_override_of_an_unknown_field_lists_those_there(config: TrainConfig, path: str):
    with pytest.raises(ConfigError, match="has no field"):
        config.override({path: 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.lr": -1}, "greater than 0"),
        ({"clip.num_slices": 8}, "must be odd"),
        ({"clip.num_key_slices": 0}, "greater than 0"),
        ({"clip.window_hu": (10, -10)}, "lower bound comes first"),
        ({"name": "a/b"}, "pattern"),
        ({"model.frozen_stages": 5}, "less than or equal to 4"),
        ({"model.backbone": "mp3d64"}, "mp3d63"),
    ],
)
def test_bad_values_are_refused_with_the_rule(config: TrainConfig, changes: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        config.override(changes)


def test_unknown_fields_are_refused_wherever_they_come_from():
    with pytest.raises(ValidationError, match="Extra inputs"):
        ClipConfig.model_validate({"num_slice": 9})


def test_identity_leaves_out_where_it_runs(config: TrainConfig):
    elsewhere = config.override(
        {"launch.storage_path": "/other", "launch.runner": "local", "tracking.mode": "disabled"}
    )
    assert elsewhere.identity() == config.identity()
    assert config.override({"optim.lr": 0.1}).identity() != config.identity()


def test_a_sweep_tunes_a_detector_in_one_process(config: TrainConfig):
    classifier = config.override({"model.head": {"kind": "classification", "num_classes": 2}})
    with pytest.raises(ValidationError, match="tunes a detector"):
        SweepConfig(name="s", base=classifier)
    with pytest.raises(ValidationError, match="one process"):
        SweepConfig(name="s", base=config.override({"loop.num_workers": 2}))
