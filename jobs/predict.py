"""Find lesions in CT series without labels: no server, no shards. DICOM, NIfTI, NRRD and MetaImage, in any folders.

    python jobs/predict.py --checkpoint RUN --input FOLDER --out findings [--fps-per-image 1] [--runner local]
    ray job submit --working-dir . -- python jobs/predict.py --checkpoint RUN ...

Boxes on neighbouring slices are grouped into lesions. Writes into --out:

    findings.json     model, threshold, protocol, policy for odd geometry, versions of the software; of each series its
                      lesions, with place and size in mm; refusals. Series are named by their Series Instance UID,
                      without DICOM by their file
    findings.csv      a row a lesion
    pictures/         a picture a lesion, with a scale, letters of the patient's sides and a caption

Exit code 0 where everything was read, 5 where more was refused than --allowed-rejects, 3 where nothing could be read.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from mp3d import cli
from mp3d.actors import answers_of_actors
from mp3d.checkpoint import Checkpoint, open_checkpoint
from mp3d.config import PredictConfig
from mp3d.data.dicom import StoredSlice
from mp3d.data.series import Volume
from mp3d.data.shard import write_aside
from mp3d.data.unlabelled import UnlabelledSeries, list_unlabelled
from mp3d.errors import DataError, Refusal
from mp3d.findings import Lesion, group_findings
from mp3d.operating_points import reporting_threshold
from mp3d.predict import Predictor, detection_head
from mp3d.report.figures import draw_finding
from mp3d.serving.engine import silent_pydicom
from mp3d.serving.schema import RESEARCH_USE_ONLY

FORMAT = "mp3d findings 2"
PRIVATE = 0o600
"""Permissions of the files: names, identifiers and images of patients are in them."""
COLUMNS: Sequence[str] = (
    "series", "series_instance_uid", "folder", "first_file", "lesion", "score", "label",
    "diameter_mm", "size_x_mm", "size_y_mm", "size_z_mm",
    "centre_x_lps_mm", "centre_y_lps_mm", "centre_z_lps_mm", "first_slice", "last_slice", "key_slice",
    "sop_instance_uid", "x1_px", "y1_px", "x2_px", "y2_px", "picture",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    command = cli.parse(PredictConfig, about=__doc__ or "", argv=argv)
    config = command.config
    located = {name: cli.absolute(getattr(config, name)) for name in ("checkpoint", "input", "out")}
    with silent_pydicom():
        return predict(config.override(located), dry_run=command.dry_run)


def predict(config: PredictConfig, *, dry_run: bool) -> int:
    checkpoint = open_checkpoint(config.checkpoint)
    detection_head(checkpoint)
    threshold, threshold_from = reporting_threshold(checkpoint, config.score_threshold, config.fps_per_image)
    config = config.override({"checkpoint": str(checkpoint.path.resolve()), "score_threshold": threshold})
    listed, refused = list_unlabelled(Path(config.input), config.geometry, config.volumes)
    if dry_run:
        cli.print_plan(
            {
                "checkpoint": f"{checkpoint.path} (epoch {checkpoint.epoch}, {checkpoint.digest[:12]})",
                "threshold": f"{threshold:.3f} ({threshold_from})",
                "series": f"{len(listed)} in {config.input}; {len(refused)} files refused",
                "runs on": f"{config.runner}, {config.num_workers} x {config.cpus_per_worker:g} CPU",
                "writes": config.out,
            }
        )
        return 0
    read = []
    rejects = [{"name": name, "reason": refusal.reason, "detail": refusal.detail} for name, refusal in refused]
    for answer in answers(config, listed):
        (rejects if "reason" in answer else read).append(answer)
        said = f"refused, {answer['reason']}" if "reason" in answer else f"{len(answer['lesions'])} lesions"
        print(f"{shown_name(answer, sys.stdout)}: {said}", flush=True)
    write_findings(Path(config.out), checkpoint, config, threshold_from, read, rejects)
    for reject in rejects:
        print(f"refused {shown_name(reject, sys.stderr)}: {reject['reason']}: {reject['detail']}", file=sys.stderr)
    print(f"{sum(len(each['lesions']) for each in read)} lesions in {len(read)} series, score from {threshold:.3f} on")
    print(f"findings: {Path(config.out) / 'findings.json'}")
    if not read:
        raise DataError(f"no CT series of {config.input} could be read; the reasons stand above and in findings.json")
    if len(rejects) > config.allowed_rejects:
        print(f"{len(rejects)} were refused, --allowed-rejects is {config.allowed_rejects}", file=sys.stderr)
        return 5
    return 0


def shown_name(answer: dict[str, Any], stream: TextIO) -> str:
    """Of a series or file on the terminal; a log, which is kept and passed on, has the number of the series only."""
    if stream.isatty():
        return f"{answer['name']} in {answer['folder']}" if "folder" in answer else answer["name"]
    return f"series {answer['number']}" if "number" in answer else "a file"


def answers(config: PredictConfig, listed: Sequence[UnlabelledSeries]) -> Iterator[dict[str, Any]]:
    """Of each series its lesions, or why it was refused; in order."""
    if not listed:
        return
    settings = {"config": config.model_dump(), "series": listed}
    tasks = [{"number": number} for number in range(1, len(listed) + 1)]
    if config.runner == "local":
        actor = SeriesActor(settings)
        for task in tasks:
            yield from (json.loads(row["answer"]) for row in actor(task))
        return
    rows = answers_of_actors(
        SeriesActor,
        settings,
        tasks,
        num_workers=config.num_workers,
        cpus_per_worker=config.cpus_per_worker,
        accelerator=config.accelerator,
    )
    for row in rows:
        yield json.loads(row["answer"])


class SeriesActor:
    """Holds the model; reads a series, finds lesions and draws them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        self.config = PredictConfig.model_validate(settings["config"])
        self.listed: Sequence[UnlabelledSeries] = settings["series"]
        torch.set_num_threads(max(1, int(self.config.cpus_per_worker)))
        self.predictor = Predictor.open(self.config.checkpoint, self.config.accelerator, self.config.mode)

    def __call__(self, task: dict[str, int]) -> list[dict[str, str]]:
        """JSON, one answer a series."""
        series = self.listed[task["number"] - 1]
        identity = {
            "number": task["number"],
            "name": series.name,
            "series_instance_uid": series.series_instance_uid,
            "folder": series.folder,
            "first_file": series.first_file,
        }
        try:
            with silent_pydicom():
                volume, stored, warnings = series.load()
        except Refusal as refusal:
            answer = {**identity, "reason": refusal.reason, "detail": refusal.detail}
            return [{"answer": json.dumps(answer)}]
        findings = self.predictor.find_lesions(volume, self.config.score_threshold or 0.0)
        grid_mm = self.predictor.clip.slice_spacing_mm
        lesions = group_findings(findings, volume, grid_mm, self.config.link_overlap)
        pictures = self._draw(task["number"], volume, lesions)
        answer = {
            **identity,
            "num_slices": len(volume.hu),
            "spacing_mm": volume.spacing_mm,
            "warnings": warnings,
            "mode": self.predictor.mode,
            "lesions": [
                lesion_out(number, lesion, stored, pictures.get(number)) for number, lesion in enumerate(lesions, 1)
            ],
        }
        return [{"answer": json.dumps(answer)}]

    def _draw(self, series: int, volume: Volume, lesions: Sequence[Lesion]) -> dict[int, str]:
        folder = Path(self.config.out) / "pictures"
        drawn = {}
        for number in range(1, min(len(lesions), self.config.max_pictures) + 1):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"series_{series:04d}_lesion_{number:02d}.png"
            png = draw_finding(volume, lesions, number)
            (folder / name).touch(mode=PRIVATE)
            (folder / name).write_bytes(png)
            drawn[number] = f"pictures/{name}"
        return drawn


def lesion_out(
    number: int, lesion: Lesion, stored: Sequence[StoredSlice] | None, picture: str | None
) -> dict[str, Any]:
    """A lesion as findings.json has it; boxes in pixels of the images as they are stored."""
    on_slices = []
    for finding in lesion.findings:
        told = asdict(finding)
        if stored is not None:
            at = stored[finding.slice_index]
            x1, y1, x2, y2 = finding.box_px
            told["box_px"] = (x1, y1 - at.row_offset, x2, y2 - at.row_offset)
            told |= {"sop_instance_uid": at.sop_instance_uid, "frame_number": at.frame or None}
        on_slices.append(told)
    return {
        "lesion": number,
        "score": lesion.score,
        "label": lesion.label,
        "diameter_mm": lesion.diameter_mm,
        "size_mm": dict(zip("xyz", lesion.size_mm, strict=True)),
        "centre_lps_mm": lesion.centre_lps_mm,
        "slices": lesion.slices,
        "key_slice": lesion.best.slice_index,
        "picture": picture,
        "findings": on_slices,
    }


def write_findings(
    out: Path,
    checkpoint: Checkpoint,
    config: PredictConfig,
    threshold_from: str,
    read: Sequence[dict[str, Any]],
    rejects: Sequence[dict[str, Any]],
) -> None:
    """``findings.json`` and ``findings.csv``, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "research_use_only": RESEARCH_USE_ONLY,
        "model": {"name": checkpoint.config.name, "digest": checkpoint.digest, "epoch": checkpoint.epoch},
        "threshold": config.score_threshold,
        "threshold_from": threshold_from,
        "protocol": {
            "num_slices": checkpoint.config.clip.num_slices,
            "slice_spacing_mm": checkpoint.config.clip.slice_spacing_mm,
            "link_overlap": config.link_overlap,
        },
        "geometry": config.geometry.model_dump(),
        "software": {package: version(package) for package in ("mp3d", "torch", "torchvision", "numpy")},
        "series": list(read),
        "refused": list(rejects),
    }
    write_aside(out / "findings.json", json.dumps(content, indent=1) + "\n", mode=PRIVATE)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for series in read:
        writer.writerows(_csv_row(series, lesion) for lesion in series["lesions"])
    write_aside(out / "findings.csv", table.getvalue(), mode=PRIVATE)


def _csv_row(series: dict[str, Any], lesion: dict[str, Any]) -> dict[str, Any]:
    best = next(each for each in lesion["findings"] if each["slice_index"] == lesion["key_slice"])
    place = dict(zip(("centre_x_lps_mm", "centre_y_lps_mm", "centre_z_lps_mm"), lesion["centre_lps_mm"], strict=True))
    box = dict(zip(("x1_px", "y1_px", "x2_px", "y2_px"), best["box_px"], strict=True))
    numbers = {
        **{f"size_{axis}_mm": length for axis, length in lesion["size_mm"].items()},
        **place,
        **box,
        "diameter_mm": lesion["diameter_mm"],
    }
    return {
        "series": series["name"],
        "series_instance_uid": series["series_instance_uid"] or "",
        "folder": series["folder"],
        "first_file": series["first_file"],
        "lesion": lesion["lesion"],
        "score": f"{lesion['score']:.4f}",
        "label": lesion["label"],
        **{name: f"{value:.2f}" for name, value in numbers.items()},
        "first_slice": lesion["slices"][0],
        "last_slice": lesion["slices"][1],
        "key_slice": lesion["key_slice"],
        "sop_instance_uid": best.get("sop_instance_uid", ""),
        "picture": lesion["picture"] or "",
    }


if __name__ == "__main__":
    sys.exit(cli.run(main))
