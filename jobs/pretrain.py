"""Pre-train a 3D backbone on ordinary colour pictures whose planes stand for slices (VDT), on Ray Train.

    python jobs/pretrain.py RECIPE --shards FOLDER [--optim.lr 0.05 ...]
    ray job submit --working-dir . -- python jobs/pretrain.py RECIPE ...

The run's folder is launch.storage_path/name; the same command goes on where it stopped.
"""

import sys
from collections.abc import Sequence

from mp3d import cli, recipes


def main(argv: Sequence[str] | None = None) -> int:
    command = cli.parse_recipe(
        recipes.PRETRAIN, recipes.synthetic_pretrain, about=__doc__ or "", argv=argv, build=lambda config: config
    )
    return cli.train_command(command, "jobs/finetune.py RECIPE --init-from {run}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
