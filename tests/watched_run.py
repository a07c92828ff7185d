"""Trains a tiny detector in a process of its own, with a W&B server that fails at a chosen moment.

python -m tests.watched_run SHARDS STORAGE MODE PICTURES [PHASE FAULT URL]
"""

import sys
import time
import urllib.request
from pathlib import Path

import torch

from mp3d import cli
from mp3d.run_folder import claim
from mp3d.session import PlainSession
from mp3d.train import train
from tests.tiny import detector_config

EPOCHS = 3


class WatchedSession(PlainSession):
    """Has the server fail when the first epoch ends, or the last one."""

    phase = fault = url = ""

    def report(self, epoch, score, metrics, save):
        super().report(epoch, score, metrics, save)
        if (self.phase, epoch) in (("middle", 1), ("end", EPOCHS)):
            time.sleep(1)  # what was sent has gone
            urllib.request.urlopen(f"{self.url}/mode/{self.fault}").read()


def main() -> int:
    shards, storage, mode, pictures, *failure = sys.argv[1:]
    torch.set_num_threads(1)
    changes = {"tracking__mode": mode, "tracking__pictures": int(pictures)}
    config = detector_config(Path(shards), Path(storage), "watched", loop__epochs=EPOCHS, **changes)
    session = WatchedSession(claim(Path(storage) / "watched", config), keep=9, device=torch.device("cpu"))
    session.phase, session.fault, session.url = failure or ("", "", "")
    train(config, session)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
