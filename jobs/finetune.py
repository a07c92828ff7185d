"""Train a lesion detector on CT, best from a pre-trained backbone, on Ray Train.

    python jobs/finetune.py RECIPE --shards FOLDER --init-from RUN [--optim.lr 0.01 ...]
    ray job submit --working-dir . -- python jobs/finetune.py RECIPE ...

The run's folder is launch.storage_path/name; the same command goes on where it stopped.
"""

import sys
from collections.abc import Sequence

from mp3d import cli, recipes


def main(argv: Sequence[str] | None = None) -> int:
    command = cli.parse_recipe(
        recipes.FINETUNE, recipes.synthetic_finetune, about=__doc__ or "", argv=argv, build=lambda config: config
    )
    return cli.train_command(command, "jobs/evaluate.py --checkpoint {run} --shards FOLDER --out reports/NAME")


if __name__ == "__main__":
    sys.exit(cli.run(main))
