"""The whole pipeline on this machine: prepare, pretrain, finetune, evaluate, serve, one real query.

    make demo                  a synthetic CT world in real DICOM files
    make demo DATA=<folder>    real data, laid out so:

        pictures/<class>/*.jpg    or Tiny-ImageNet's train/ and val/
        ct/<patient>/...          DICOM series with RTSTRUCT, or CT_image.nii.gz and CT_mask.nii.gz
        query/...                 one DICOM series to ask the endpoint about

Every step is a command that you could type, printed before it runs; all share one local Ray. What stands already is
not done again.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mp3d import cli
from mp3d.client import wait_until_ready
from mp3d.data.made_world import write_synthetic_world
from mp3d.data.shard import open_shards
from mp3d.errors import ConfigError, Mp3dError
from mp3d.launch import connect_ray

READY_TIMEOUT_S = 180
SHOWN_SCORE = 0.1
"""Of the findings in the last table: low, so that also a weak detector shows what it looked at."""
PARTIAL = 5
"""Exit code of ``prepare`` when it refused a part of the data."""


class StepFailed(Mp3dError):
    """A step of the demo ended with an error; it has said why."""


@dataclass(frozen=True)
class Plan:
    """Where the raw data lie and how each is read and learned."""

    pictures: Path
    ct: Path
    ct_reader: str
    query: Path
    recipes: str
    """``synthetic`` or ``small``."""
    split_fractions: tuple[float, float, float]
    """Of the patients: train, val, test."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with real data (default: a synthetic world)")
    parser.add_argument("--out", type=Path, help="folder of everything the demo makes (default: demo, or demo-real)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    out = (args.out or cli.root() / ("demo-real" if args.data else "demo")).resolve()
    plan = real_data(args.data) if args.data else synthetic_data(out / "raw")
    with ray_head():
        report = pipeline(plan, out, cpus=min(2, os.cpu_count() or 1))
    print(f"\nreport with pictures: {report}\nthe demo took {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def pipeline(plan: Plan, out: Path, *, cpus: int) -> Path:
    """Run every step, and return where the report is."""
    pictures, ct, runs = out / "shards" / "pictures", out / "shards" / "ct", out / "runs"
    job("prepare", "--out", pictures, "pictures", "--root", plan.pictures)
    job(
        "prepare", "--out", ct, "--items-per-part", 4, "--split-fractions", *plan.split_fractions,
        plan.ct_reader, "--root", plan.ct,
    )  # fmt: skip
    where = ("--launch.storage-path", runs, "--launch.cpus-per-worker", cpus)
    pretrain, finetune = f"{plan.recipes}_pretrain", f"{plan.recipes}_finetune"
    classes = len(open_shards(pictures).class_names)
    job("pretrain", pretrain, "--shards", pictures, "--model.head.num-classes", classes, *where)
    job("finetune", finetune, "--shards", ct, "--init-from", runs / pretrain, *where)
    report = out / "report"
    job(
        "evaluate", "--checkpoint", runs / finetune, "--shards", ct, "--out", report, "--ablations", "--streamed",
        "--cpus-per-worker", cpus,
    )  # fmt: skip
    with endpoint(runs / finetune, out / "serve.log") as url:
        step([sys.executable, "-m", "mp3d.client", url, plan.query, "--threshold", SHOWN_SCORE])
    return report / "report.html"


def synthetic_data(raw: Path) -> Plan:
    write_synthetic_world(raw)
    return Plan(
        raw / "pictures", raw / "ct", "dicom", raw / "query" / "SYN-0001" / "CT", "synthetic", (0.7, 0.15, 0.15)
    )


def real_data(folder: Path) -> Plan:
    """Raises: ConfigError, naming the part of the layout that is missing."""
    folder = folder.expanduser().resolve()
    for part in ("pictures", "ct", "query"):
        if not (folder / part).is_dir():
            raise ConfigError(f"{folder} has no folder {part!r}; the demo needs pictures/, ct/ and query/ (see --help)")
    has_nifti = any(
        name.endswith((".nii", ".nii.gz")) for *_, names in os.walk(folder / "ct", followlinks=True) for name in names
    )
    return Plan(
        folder / "pictures",
        folder / "ct",
        "volumes" if has_nifti else "dicom",
        folder / "query",
        "small",
        (0.6, 0.15, 0.25),
    )


@contextmanager
def ray_head() -> Iterator[None]:
    """One local Ray for all steps, which find it by RAY_ADDRESS."""
    import ray

    print("starting a local Ray", flush=True)
    connect_ray(dashboard=True, show_logs=False)  # each step shows its own
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def endpoint(checkpoint: Path, log: Path) -> Iterator[str]:
    """``serve run`` on a free port of this machine while the block lasts; yields its URL."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    command = [Path(sys.executable).with_name("serve"), "run", "serve.app:build", f"checkpoint={checkpoint}"]
    show(command)
    print(f"-- on port {port}, its log in {os.path.relpath(log)}", flush=True)
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        # a demo in the background of a script was started with SIGINT ignored, which the endpoint would inherit
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=subprocess.STDOUT)
        signal.signal(signal.SIGINT, before)
        try:
            wait_until_ready(url, READY_TIMEOUT_S)
            yield url
        finally:
            process.send_signal(signal.SIGINT)  # as Ctrl-C does: the application is removed
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def job(name: str, *args: object) -> None:
    step([sys.executable, Path(__file__).with_name(f"{name}.py"), *args])


def step(command: Sequence[object]) -> None:
    """Print a command, run it, and stop the demo if it fails."""
    show(command)
    started = time.monotonic()
    code = subprocess.run([str(word) for word in command], check=False).returncode
    if code == PARTIAL:
        print("-- what was refused is left out")
    elif code:
        raise StepFailed(f"the step ended with exit code {code}; mend what it says and call the demo again")
    print(f"-- {time.monotonic() - started:.0f} s", flush=True)


def show(command: Sequence[object]) -> None:
    words = [os.path.relpath(str(word)) if Path(str(word)).is_absolute() else str(word) for word in command]
    words[0] = Path(str(command[0])).name
    print(f"\n$ {shlex.join(words)}", flush=True)


def free_port(preferred: int = 8000) -> int:
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise OSError("no free port on this machine")


if __name__ == "__main__":
    sys.exit(cli.run(main))
