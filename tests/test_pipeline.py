"""The whole pipeline by its commands, on a tiny made world: prepare, pretrain, finetune, sweep, evaluate, serve."""

import json
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from jobs import evaluate, finetune, prepare, pretrain, sweep
from mp3d.checkpoint import open_checkpoint
from mp3d.data.shard import open_shards
from mp3d.data.synthetic import write_bad_files, write_ct_world, write_picture_world

SMALL_BACKBONE = ("--model.width", "0.125")
SMALL_DETECTOR = (*SMALL_BACKBONE, "--model.head.fpn-channels", "16", "--model.head.box-features", "32")
"""The same recipes, quicker."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("world") / "raw"
    write_ct_world(raw / "ct", num_patients=6, seed=3, size_px=64, num_slices=12)
    write_ct_world(raw / "query", num_patients=1, seed=4, size_px=64, num_slices=12)
    write_bad_files(raw / "ct" / "bad")
    write_picture_world(raw / "pictures", num_per_class=8, seed=3)
    return raw


@pytest.mark.e2e
@pytest.mark.ray
def test_the_pipeline(ray_cluster: None, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MP3D_ROOT", str(tmp_path))
    ct, pictures = str(tmp_path / "ct"), str(tmp_path / "pictures")
    quick = ("--loop.epochs", "2", "--loop.steps-per-epoch", "3", "--launch.cpus-per-worker", "1")

    assert prepare.main(["--out", pictures, "pictures", "--root", str(world / "pictures")]) == 0
    code = prepare.main(["--out", ct, "dicom", "--root", str(world / "ct")])
    assert code == 5, "three bad files are refused, the rest is prepared"
    assert {"NOT_DICOM", "TRUNCATED", "NOT_CT"} <= {reject.reason for reject in open_shards(ct).rejects}

    assert pretrain.main(["synthetic_pretrain", "--shards", pictures, *SMALL_BACKBONE, *quick]) == 0
    assert (
        finetune.main(
            ["synthetic_finetune", "--shards", ct, "--init-from", "runs/synthetic_pretrain", *SMALL_DETECTOR, *quick]
        )
        == 0
    )
    transfer = json.loads((tmp_path / "runs" / "synthetic_finetune" / "transfer.json").read_text())
    assert any("stage4" in key for key in transfer["moved"])

    assert (
        sweep.main(
            ["synthetic_finetune", "--name", "search", "--num-trials", "2", "--base.shards", ct]
            + [f"--base.{option[2:]}" if option.startswith("--") else option for option in (*SMALL_DETECTOR, *quick)]
        )
        == 0
    )
    winner = tmp_path / "runs" / "search" / "best"

    report = tmp_path / "report"
    args = ["--checkpoint", str(winner), "--shards", ct, "--out", str(report), "--ablations"]
    assert evaluate.main(args) == 0
    metrics = json.loads((report / "metrics.json").read_text())
    assert "MP3D" in json.dumps(metrics)
    assert (report / "report.html").read_text().count("data:image/png;base64") > 1

    query(winner, world / "query" / "SYN-0001" / "CT")


def query(checkpoint: Path, series: Path) -> None:
    """What the endpoint answers, without Serve; test_serve_ray has the rest."""
    from mp3d.config import ServeConfig
    from mp3d.predict import Predictor
    from mp3d.serving.engine import Engine, model_out

    opened = open_checkpoint(checkpoint)
    engine = Engine(Predictor.open(opened, "cpu"), model_out(opened), ServeConfig(checkpoint=str(checkpoint)))
    body = BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for path in series.iterdir():
            archive.write(path, path.name)
    answer = engine.answer(body.getvalue(), threshold=0.0)
    assert answer.num_slices == 12
    assert answer.model.digest == opened.digest
