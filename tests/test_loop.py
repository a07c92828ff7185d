"""What the loop can be asked for: accumulation, moving average, early stop, left-out steps, balance, scaled rates.

Each against a value worked out elsewhere, and all of them together in a run that is killed and resumed.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mp3d.checkpoint import open_checkpoint
from mp3d.config import OptimConfig, SegmentationHead, TrainConfig
from mp3d.data.batches import Batch, ClipDataset, batched, training_loader
from mp3d.data.samples import annotated_samples, classified_samples
from mp3d.data.shard import open_shards
from mp3d.data.stream import Stream
from mp3d.data.survey import read_image_labels
from mp3d.early_stop import BestSoFar
from mp3d.ema import build_average
from mp3d.launch import run_training
from mp3d.models import ClipClassifier
from mp3d.schedule import scaled_to_batch
from mp3d.session import PlainSession, read_metrics
from mp3d.step import NONFINITE, Run, TrainingDiverged, train_step
from mp3d.train import start, train
from tests.recipe_runs import Killed, MortalSession
from tests.tiny import ball_config, ball_shards, classifier_config, ct_shards, detector_config, picture_shards


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct_shards(tmp_path_factory.mktemp("ct") / "shards")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_shards(tmp_path_factory.mktemp("pictures") / "shards")


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ball_shards(tmp_path_factory.mktemp("balls") / "shards")


EVERYTHING = {
    "loop.epochs": 3, "loop.steps_per_epoch": 2, "loop.accumulate": 2, "loop.batch_size": 2, "loop.ema_decay": 0.9,
    "loop.patience": 3, "loop.allowed_skips": 2, "loop.balance": "patients", "optim.lr_batch": 16,
    "optim.clip_grad_norm": 1.0, "augment.preset": "strong",
}  # fmt: skip


def everything_on(kind: str, ct: Path, pictures: Path, balls: Path, storage: Path) -> TrainConfig:
    match kind:
        case "detector":
            config = detector_config(ct, storage, clip__num_key_slices=5).override(
                {"loop.negatives": 0.5, "augment.image_sizes": (24, 32), "optim.schedule": "step"}
                | {"optim.milestones": (1, 2)}
            )
        case "classifier":
            config = classifier_config(pictures, storage).override({"model.norm": "bn", "optim.algorithm": "sgd"})
        case _:
            head = SegmentationHead(dropout=0.2)
            config = ball_config(balls, storage, head).override({"model.norm": "bn", "optim.schedule": "poly"})
    changes = EVERYTHING | ({"loop.balance": "classes"} if kind == "classifier" else {})
    return config.override(changes).override({"loop.precision": "bf16" if kind == "classifier" else "fp32"})


@pytest.mark.parametrize("kind", ["detector", "classifier", pytest.param("segmenter", marks=pytest.mark.acceptance)])
def test_a_killed_run_goes_on_to_the_bit_with_everything_on(
    ct: Path, pictures: Path, balls: Path, tmp_path: Path, kind: str
):
    config = everything_on(kind, ct, pictures, balls, tmp_path)
    unbroken = run_training(config)
    broken = tmp_path / "broken"
    broken.mkdir()
    device = torch.device("cpu")
    with pytest.raises(Killed):
        train(config, MortalSession(broken, keep=3, device=device))
    train(config, PlainSession(broken, keep=3, device=device))
    assert read_metrics(broken) == read_metrics(unbroken)
    expected, got = (open_checkpoint(run / "epoch_0003") for run in (unbroken, broken))
    for one, other in (
        (expected.model_state(), got.model_state()),
        (expected.trainer_state().tensors, got.trainer_state().tensors),
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert expected.trainer_state().values == got.trainer_state().values
    averaged, trained = expected.model_state(), expected.trainer_state().tensors
    assert any(not torch.equal(value, trained[f"model.{name}"]) for name, value in averaged.items())


def prepared(config: TrainConfig) -> tuple[Run, list[Batch]]:
    """A new run of a classifier, and the micro-batches of its first step."""
    shards = open_shards(config.shards)
    samples = classified_samples(shards, "train")
    stream = Stream(samples, [], negatives=0, seed=0)
    dataset = ClipDataset(shards, stream.samples, config.clip, config.augment, 0)
    run = start(config, PlainSession(Path(config.launch.storage_path), keep=1, device=torch.device("cpu")), 4)
    run.model.train()
    loader = training_loader(
        dataset, stream, batch_size=config.loop.batch_size, steps=range(config.loop.accumulate), rank=0,
        world_size=1, workers=0,
    )  # fmt: skip
    (batches,) = batched(loader, config.loop.accumulate)
    return run, batches


def first_step(config: TrainConfig) -> tuple[Run, dict[str, torch.Tensor] | None]:
    run, batches = prepared(config)
    return run, train_step(run, batches, 0, config.optim.lr)


def test_scaled_losses_make_the_same_step_and_an_overflow_makes_none(pictures: Path, tmp_path: Path):
    """The way of float16, whose small gradients a scaled loss keeps; here in float32, as no CPU trains in float16."""
    config = classifier_config(pictures, tmp_path, optim__clip_grad_norm=0.05, loop__accumulate=2)
    plain, _ = first_step(config)
    scaled, batches = prepared(config)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [parameter.detach().clone() for parameter in scaled.model.parameters()]
    assert train_step(scaled, batches, 0, config.optim.lr) is not None
    for one, other in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(one, old) for one, old in zip(scaled.model.parameters(), before, strict=True))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [parameter.detach().clone() for parameter in scaled.model.parameters()]
    assert train_step(scaled, batches, 1, config.optim.lr) is None
    assert all(torch.equal(one, old) for one, old in zip(scaled.model.parameters(), before, strict=True))
    assert (scaled.skipped, scaled.scaler.get_scale()) == (0, 2.0**126)


class NaNGradient(torch.autograd.Function):
    """Passes a finite value on, whose gradient is not finite."""

    @staticmethod
    def forward(ctx, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("nan")


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, batches = prepared(classifier_config(pictures, tmp_path, loop__ema_decay=0.9))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    finite = run.model.forward
    monkeypatch.setattr(
        run.model, "forward", lambda *a, **k: {n: NaNGradient.apply(v) for n, v in finite(*a, **k).items()}
    )
    assert [train_step(run, batches, step, 1e-3) for step in range(2)] == [None, None]
    assert (run.skipped, run.scaler.get_scale()) == (0, 1.0)
    assert run.average is not None
    assert run.average.n_averaged == 0
    with pytest.raises(TrainingDiverged, match="step 2: the gradient is not finite"):
        train_step(run, batches, 2, 1e-3)


def test_accumulated_batches_have_the_gradient_of_one(pictures: Path, tmp_path: Path):
    whole, losses = first_step(classifier_config(pictures, tmp_path, loop__batch_size=8))
    parts, same = first_step(classifier_config(pictures, tmp_path, loop__batch_size=2, loop__accumulate=4))
    assert losses is not None
    assert same is not None
    assert same["loss_classification"].item() == pytest.approx(losses["loss_classification"].item(), rel=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_gradients_are_clipped_to_the_norm(pictures: Path, tmp_path: Path):
    run, _ = first_step(classifier_config(pictures, tmp_path, optim__clip_grad_norm=0.01))
    norm = torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_losses_are_float32_under_bf16(ct: Path, pictures: Path, balls: Path, tmp_path: Path):
    for config in (
        detector_config(ct, tmp_path), classifier_config(pictures, tmp_path),
        ball_config(balls, tmp_path, SegmentationHead()),
    ):  # fmt: skip
        seen = []
        config = config.override({"loop.precision": "bf16", "loop.epochs": 1, "loop.steps_per_epoch": 1})
        session = PlainSession(tmp_path / config.name, keep=1, device=torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "mp3d.train.train_step", lambda *given, into=seen: into.append(train_step(*given)) or into[-1]
            )
            train(config, session)
        (losses,) = seen
        assert {value.dtype for value in losses.values()} == {torch.float32}


def test_the_moving_average_is_its_formula_buffers_and_all():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = build_average(model, 0.9)
    expected: dict[str, np.ndarray] = {}
    for number in range(5):
        model(torch.randn(6, 3))  # moves the running statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update_parameters(model)
        decay = min(0.9, (1 + number) / (10 + number))
        for name, value in model.state_dict().items():
            now = value.numpy().astype(np.float64)
            if number == 0 or name.endswith("num_batches_tracked"):
                expected[name] = now
            else:
                expected[name] = decay * expected[name] + (1 - decay) * now
    for name, value in average.module.state_dict().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_run_stops_when_nothing_gets_better_and_stays_stopped(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = classifier_config(
        pictures, tmp_path, loop__epochs=9, loop__patience=2, loop__steps_per_epoch=1, optim__lr=1e-12
    )
    run = run_training(config)
    assert [line["epoch"] for line in read_metrics(run)] == [1, 2, 3]
    assert "nothing better since epoch 1" in capsys.readouterr().out
    run_training(config)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_patience_counts_from_the_best_epoch():
    best = BestSoFar()
    for epoch, score in enumerate([0.1, 0.3, float("nan"), 0.3, 0.2], start=1):
        best.update(epoch, score)
    assert best == BestSoFar(2, 0.3)
    assert best.is_stale(5, 3)
    assert not best.is_stale(4, 3)
    assert not best.is_stale(100, None)


class NaNOnce(ClipClassifier):
    """Has no finite loss in the steps that are listed; its batch norm is spoilt by them."""

    bad: tuple[int, ...] = ()
    calls = 0

    def forward(self, clips, targets=None, image_size=None):
        if not self.training:
            return super().forward(clips, targets, image_size)
        NaNOnce.calls += 1
        losses = super().forward(clips, targets, image_size)
        return {name: loss * float("nan") if NaNOnce.calls in self.bad else loss for name, loss in losses.items()}


@pytest.fixture
def nan_model(monkeypatch: pytest.MonkeyPatch) -> None:
    NaNOnce.calls, NaNOnce.bad = 0, ()
    monkeypatch.setattr("mp3d.models.ClipClassifier", NaNOnce)


@pytest.mark.usefixtures("nan_model")
def test_a_step_that_is_not_finite_is_left_out_without_a_trace_and_named(pictures: Path, tmp_path: Path):
    """Of four steps the second is spoilt: weights, statistics and average are those before it."""
    config = classifier_config(
        pictures, tmp_path, model__norm="bn", loop__allowed_skips=1, loop__ema_decay=0.5, loop__steps_per_epoch=2,
        loop__epochs=1,
    )  # fmt: skip
    NaNOnce.bad = (2,)
    run = run_training(config)
    state, trainer = open_checkpoint(run).model_state(), open_checkpoint(run).trainer_state()
    assert all(torch.isfinite(value.float()).all() for value in state.values())
    assert trainer.values["skipped"] == 1
    assert trainer.values["averaged"] == 1
    tracked = next(value for name, value in state.items() if name.endswith("num_batches_tracked"))
    assert tracked == 1
    (file,) = (run / NONFINITE).iterdir()
    assert file.name == "step_00000001_rank_0.json"
    content = json.loads(file.read_text())
    assert (content["step"], content["fault"], len(content["batch"])) == (1, "loss", 8)
    assert all({"patient", "series", "z_index"} == set(one) for one in content["batch"])


@pytest.mark.usefixtures("nan_model")
def test_more_such_steps_than_allowed_stop_the_run(pictures: Path, tmp_path: Path):
    NaNOnce.bad = (1, 3)
    config = classifier_config(pictures, tmp_path, loop__allowed_skips=1, loop__steps_per_epoch=4)
    with pytest.raises(
        TrainingDiverged,
        match=r"step 2: the loss is nan.*step_00000002_rank_0.json.*allowed_skips is 1, .* under a new --name, lower",
    ):
        run_training(config)
    assert len(list((tmp_path / config.name / NONFINITE).iterdir())) == 2
    NaNOnce.calls = 0
    run = run_training(config.override({"loop.allowed_skips": 2}))
    assert open_checkpoint(run).trainer_state().values["skipped"] == 2


def test_rates_scale_with_the_batch():
    sgd = OptimConfig(lr=0.02, lr_batch=16, min_lr=1e-4)
    assert scaled_to_batch(sgd, 64).lr == pytest.approx(0.08)
    assert scaled_to_batch(sgd, 64).min_lr == pytest.approx(4e-4)
    adam = OptimConfig(algorithm="adam", lr=1e-3, lr_batch=16)
    assert scaled_to_batch(adam, 64).lr == pytest.approx(2e-3)
    assert scaled_to_batch(OptimConfig(lr=0.02), 64).lr == 0.02


def test_the_rate_in_the_metrics_is_that_of_the_whole_batch(pictures: Path, tmp_path: Path):
    config = classifier_config(
        pictures, tmp_path, optim__algorithm="sgd", optim__lr=0.1, optim__lr_batch=64, optim__schedule="constant",
        optim__warmup_steps=0, loop__batch_size=8, loop__accumulate=2, loop__epochs=1, loop__steps_per_epoch=1,
    )  # fmt: skip
    assert read_metrics(run_training(config))[0]["lr"] == pytest.approx(0.1 * 16 / 64)


def test_patients_come_equally_often_and_their_samples_in_turn(ct: Path):
    positives, spare = annotated_samples(open_shards(ct), "train", negatives=1.0)
    few = [sample for sample in positives if sample.entry.patient != positives[0].entry.patient] + positives[:1]
    stream = Stream(few, spare, negatives=0.5, seed=1, kind=lambda sample: sample.entry.patient)
    places = [stream.place(i).sample for i in range(12 * len(stream))]
    keys = Counter(stream.samples[i].entry.patient for i in places if i < len(few))
    assert max(keys.values()) - min(keys.values()) <= 1
    empty = Counter(stream.samples[i].entry.patient for i in places if i >= len(few))
    assert max(empty.values()) - min(empty.values()) <= 1
    times = Counter(places)
    rare = times[len(few) - 1]
    others = [times[i] for i in range(len(few) - 1)]
    assert rare >= 2.5 * max(others), "the only sample of its patient stands for three"
    assert max(others) - min(others) <= 1
    again = Stream(few, spare, negatives=0.5, seed=1, kind=lambda sample: sample.entry.patient)
    assert [again.place(i).sample for i in reversed(range(40))][::-1] == places[:40]


def test_classes_come_equally_often(pictures: Path):
    shards = open_shards(pictures)
    labels = read_image_labels(shards, "train")
    samples = classified_samples(shards, "train")

    def label(sample) -> int | None:
        return labels[sample.entry.series][sample.row]

    rare = [sample for sample in samples if label(sample) == 0][:2]
    stream = Stream([s for s in samples if label(s) == 1] + rare, [], negatives=0, seed=0, kind=label)
    drawn = Counter(label(stream.samples[stream.place(i).sample]) for i in range(10 * len(stream)))
    assert drawn[0] == drawn[1] == 5 * len(stream)


def test_classes_are_balanced_for_classifiers_only(ct: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="balance a detection head by patients"):
        detector_config(ct, tmp_path, loop__balance="classes")
