"""Search for the best detector by Ray Tune: anchors, learning rate, frozen stages. ASHA stops what is worse.

    python jobs/sweep.py RECIPE --name SWEEP --num-trials 16 [--base.init-from RUN ...]
    ray job submit --working-dir . -- python jobs/sweep.py RECIPE --name SWEEP ...

The best checkpoint is copied to storage_path/SWEEP/best; the same command goes on with a sweep that was cut off.
"""

import sys
from collections.abc import Sequence

from mp3d import cli, recipes
from mp3d.config import SweepConfig, TrainConfig


def around(base: TrainConfig) -> SweepConfig:
    """The default sweep of a recipe: learning rates around its own."""
    return SweepConfig(name=f"{base.name}_sweep", base=base, lr=(base.optim.lr / 10, base.optim.lr * 3))


def main(argv: Sequence[str] | None = None) -> int:
    command = cli.parse_recipe(
        recipes.FINETUNE, recipes.synthetic_finetune, about=__doc__ or "", argv=argv,
        build=around,
    )  # fmt: skip
    return cli.sweep_command(command)


if __name__ == "__main__":
    sys.exit(cli.run(main))
