"""What every job shares: the command line of a recipe, readable failures, exit codes, where relative paths lie.

Exit codes: 0 done, 1 a defect (with a traceback), 2 wrong command or configuration, 3 data or checkpoint that cannot
be used, 4 missing resources, 5 prepared or predicted, but more was refused than allowed, 130 interrupted, 141 nobody
reads the output any more.
"""

import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from pydantic import ValidationError

from mp3d.checkpoint import open_checkpoint
from mp3d.config import Config, SweepConfig, TrainConfig
from mp3d.config.clips import PRESETS
from mp3d.data.made_world import ensure_synthetic_shards
from mp3d.data.smoke_world import ensure_smoke_shards
from mp3d.errors import ConfigError, Mp3dError
from mp3d.launch import run_training
from mp3d.recipes import SYNTHETIC_WORLD, Recipe
from mp3d.recipes.smoke import SMOKE_WORLD, SUFFIX, smoke_of
from mp3d.schedule import scaled_to_batch
from mp3d.sweep import run_sweep, trials_table
from mp3d.tracking import tracking_mode

EXIT_CODES = """exit codes: 0 done · 1 defect · 2 wrong command or configuration · 3 unusable data or checkpoint ·
4 missing resources · 5 more refused than allowed · 130 interrupted · 141 nobody reads the output any more"""


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Command(Generic[C]):
    """A parsed command line."""

    config: C
    dry_run: bool
    default_recipe: bool
    """No recipe was named."""


def parse_recipe(
    recipes: Sequence[Recipe],
    default: Recipe,
    *,
    about: str,
    argv: Sequence[str] | None,
    build: Callable[[TrainConfig], C],
) -> Command[C]:
    """``[RECIPE] [--field value ...] [--dry-run]``; without a recipe the default one is taken.

    Usage errors exit with 2, as ``--help`` does with 0.

    Args:
        build: makes the job's configuration of a recipe's.

    Raises:
        ConfigError: no such recipe; the message has the nearest name.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] in (["-h"], ["--help"]):
        print(overview(recipes, about))
        sys.exit(0)
    named = bool(args) and not args[0].startswith("-")
    recipe = find_recipe(recipes, args.pop(0)) if named else default
    config = build(recipe())
    if presets := _presets(args):
        config = config.override(presets)  # first, for the parser gives every field a value and would undo it

    def command(
        config: Annotated[type(config), tyro.conf.arg(name="")] = config,  # type: ignore[valid-type]
        dry_run: Annotated[bool, tyro.conf.arg(help="Print the plan and stop.")] = False,
    ) -> Command:
        return Command(config, dry_run, default_recipe=not named)

    return tyro.cli(
        command,
        args=args,
        prog=f"{Path(sys.argv[0]).name} {recipe.__name__}",
        description=(recipe.__doc__ or "").splitlines()[0],
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )


def _presets(args: Sequence[str]) -> dict[str, str]:
    """The presets on a command line, by field; what is no preset is left to the parser to complain of."""
    found = {}
    for number, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.startswith("--") and name.endswith("augment.preset"):
            value = value if equals else "".join(args[number + 1 : number + 2])
            found |= {name.removeprefix("--"): value} if value in PRESETS else {}
    return found


def parse(kind: type[C], *, about: str, argv: Sequence[str] | None) -> Command[C]:
    """``--field value ... [--dry-run]`` of a configuration without recipes."""

    def command(
        config: Annotated[kind, tyro.conf.arg(name="")],  # type: ignore[valid-type]
        dry_run: Annotated[bool, tyro.conf.arg(help="Print the plan and stop.")] = False,
    ) -> Command:
        return Command(config, dry_run, default_recipe=False)

    return tyro.cli(
        command, args=argv, description=f"{about.strip()}\n\n{EXIT_CODES}", config=(tyro.conf.FlagCreatePairsOff,)
    )


def overview(recipes: Sequence[Recipe], about: str) -> str:
    """The help of a job that takes a recipe."""
    lines = [f"  {recipe.__name__:<26}{(recipe.__doc__ or '').splitlines()[0]}" for recipe in recipes]
    title = f"recipes (RECIPE --help lists the fields of one; RECIPE{SUFFIX} is one at smoke size, on made data):"
    return "\n".join([about.strip(), "", title, *lines, "", EXIT_CODES])


def find_recipe(recipes: Sequence[Recipe], name: str) -> Recipe:
    """The recipe of a name, or of one at smoke size.

    Raises:
        ConfigError: there is no such recipe; the message has the nearest name.
    """
    by_name = {recipe.__name__: recipe for recipe in recipes}
    if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in by_name:
        return smoke_of(by_name[name.removesuffix(SUFFIX)])
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"there is no recipe {name!r}; {hint}recipes: {', '.join(by_name)}")
    return by_name[name]


def run(main: Callable[[], int | None]) -> int:
    """Call a job's main function and turn what stops it into one readable line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        return main() or 0
    except Mp3dError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ValidationError as error:
        print(f"error: {readable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def readable(error: ValidationError) -> str:
    """A pydantic error as one line a field."""
    lines = [
        f"{'.'.join(map(str, fault['loc'])) or error.title}: {fault['msg']} (got {fault['input']!r})"
        for fault in error.errors()
    ]
    return f"{error.title} is not valid\n  " + "\n  ".join(lines)


def print_plan(plan: dict[str, Any]) -> None:
    """The plan of ``--dry-run``, one aligned line a fact."""
    width = max(map(len, plan))
    for name, value in plan.items():
        print(f"{name:<{width}}  {value}")


def root() -> Path:
    """What relative paths are relative to.

    ``$MP3D_ROOT`` if set; else the current folder; but in a job that Ray unpacked from an uploaded working directory,
    whose folder is temporary, ``~/mp3d``.
    """
    if named := os.environ.get("MP3D_ROOT"):
        return Path(named).expanduser().absolute()
    here = Path.cwd()
    return Path.home() / "mp3d" if "working_dir_files" in here.parts else here


def absolute(path: str) -> str:
    """A path as every worker can open it; URLs (``s3://``) are left alone."""
    return path if "://" in path else str((root() / Path(path).expanduser()).resolve())


def located(config: TrainConfig) -> TrainConfig:
    """The same run with absolute paths."""
    changes = {"shards": absolute(config.shards), "launch.storage_path": absolute(config.launch.storage_path)}
    if config.init_from:
        changes["init_from"] = absolute(config.init_from)
    if config.launch.cache_dir:
        changes["launch.cache_dir"] = absolute(config.launch.cache_dir)
    return config.override(changes)


def train_command(command: Command[TrainConfig], next_step: str) -> int:
    """Run (or only plan) a parsed training command and say what to do next."""
    config = located(command.config)
    run_dir = Path(config.launch.storage_path) / config.name
    if command.default_recipe:
        print(f"no recipe was named: running {config.name!r} on the synthetic world in {Path(config.shards).parent}")
    if command.dry_run:
        print_plan(training_plan(config))
        return 0
    ensure_shards(command.config.shards)
    run_training(config, announce=lambda fitted: print_plan(cost_plan(fitted)))
    best = open_checkpoint(run_dir)
    print(f"best checkpoint: {best.path} (epoch {best.epoch}, score {best.score:.4f})")
    print(f"next: python {next_step.format(run=run_dir)}")
    return 0


def sweep_command(command: Command[SweepConfig]) -> int:
    """Run (or only plan) a parsed sweep and print its table."""
    sweep = command.config.override({"base": located(command.config.base)})
    folder = Path(sweep.base.launch.storage_path) / sweep.name
    if command.default_recipe:
        print(f"no recipe was named: sweeping {sweep.base.name!r} on the synthetic world")
    if command.dry_run:
        points = {
            "learning rate": sweep.lr,
            "anchors": ", ".join(sweep.anchors),
            "anchor ratios": sweep.anchor_ratios,
            "frozen stages": sweep.frozen_stages,
        }
        print_plan({"sweep": folder, "trials": sweep.num_trials, **points, **training_plan(sweep.base), "run": folder})
        return 0
    ensure_shards(command.config.base.shards)
    best = run_sweep(sweep)
    print(trials_table(folder))
    print(f"best checkpoint: {best}")
    print(f"next: serve run serve.app:build checkpoint={best}")
    return 0


def ensure_shards(shards: str) -> None:
    """Make the synthetic world, or the data of a smoke size, where a recipe's own path to it was left as it is; data of
    the user's are never made.
    """
    if Path(shards).parent == Path(SYNTHETIC_WORLD):
        ensure_synthetic_shards(Path(absolute(SYNTHETIC_WORLD)))
    if Path(shards).parent == Path(SMOKE_WORLD):
        ensure_smoke_shards(Path(absolute(shards)))


def training_plan(config: TrainConfig) -> dict[str, Any]:
    """What a run would do, in words."""
    run_dir = Path(config.launch.storage_path) / config.name
    clip, model, loop, optim = config.clip, config.model, config.loop, config.optim
    return {
        "run": f"{run_dir}{' (exists: would be resumed)' if run_dir.exists() else ''}",
        "shards": config.shards,
        "start from": config.init_from or "random weights",
        "model": f"{model.backbone} x{model.width:g}, norm {model.norm}, {model.head.kind} head"
        + (", anchors fitted to the shards" if model.head.kind == "detection" and model.head.anchors == "fit" else ""),
        **cost_plan(config),
        "clip": f"{clip.depth} slices, {clip.slice_spacing_mm or 'their own'} mm apart, {clip.image_size} px"
        + (f" of {clip.pixel_spacing_mm or 'their own'} mm, block: {clip.block}" if clip.block else ""),
        "training": f"{loop.epochs} epochs of {loop.steps_per_epoch or 'all'} steps, "
        f"{loop.batch_size} x {loop.accumulate} x {loop.num_workers} clips a step",
        "optimiser": f"{optim.algorithm}, lr {optim.lr:g}{_scaled(config)}, {optim.schedule}",
        "runs on": f"{config.launch.runner}, {loop.num_workers} x {config.launch.cpus_per_worker:g} CPU, "
        f"accelerator {config.launch.accelerator}, precision {loop.precision}",
        "tracking": f"W&B {tracking_mode(config.tracking.mode)}, project {config.tracking.project}",
    }


def _scaled(config: TrainConfig) -> str:
    optim, clips = config.optim, config.loop.step_clips * config.loop.num_workers
    rate = scaled_to_batch(optim, clips).lr
    return "" if rate == optim.lr else f" for {optim.lr_batch} clips a step: {rate:.3g} for {clips}"


def cost_plan(config: TrainConfig) -> dict[str, str]:
    """Size of the model, operations of a clip, and the memory that a training step keeps, in words."""
    import torch

    from mp3d.device import pick_device, resolve_precision
    from mp3d.models.cost import estimate

    clip, loop = config.clip, config.loop
    largest = max(config.augment.image_sizes or (clip.image_size,))
    half = loop.precision in ("bf16", "fp16")
    if loop.precision == "auto":
        half = config.launch.accelerator == "gpu" or resolve_precision("auto", pick_device(config.launch.accelerator))
    dtype = torch.bfloat16 if half else None
    inferred = estimate(config.model, clip, clip.image_size, dtype)
    trained = inferred if largest == clip.image_size else estimate(config.model, clip, largest, dtype)
    step = trained.of_step(loop.batch_size, adam=config.optim.algorithm != "sgd")
    frozen = inferred.parameters - inferred.trained
    return {
        "parameters": f"{inferred.parameters:,}" + (f", {frozen:,} of them frozen" if frozen else ""),
        "computation": f"{inferred.flops / 1e9:.4g} GFLOP a clip of {clip.image_size} px "
        f"({inferred.backbone_flops / 1e9:.4g} in the backbone), about three times that in training",
        "memory": f"about {step / 2**30:.2g} GiB for a step of {loop.batch_size} clips of {largest} px in "
        f"{'half precision' if half else 'float32'}, and the workspaces of the kernels",
    }
