"""What the tests share: one Ray for each process, and nothing of this machine's user."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mp3d.launch import connect_ray, set_ray_environment

# Keys and tokens of the tests live in a folder of their own. All of this before anything imports torch or Ray.
_HOME = tempfile.TemporaryDirectory(prefix="mp3d-tests-")
os.environ["MP3D_ID_KEY_FILE"] = str(Path(_HOME.name) / "id_key")
os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(_HOME.name) / "auth_token")
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "agg"
for _name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "MP3D_ROOT"):
    os.environ.pop(_name, None)
set_ray_environment()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The one local Ray of a test process: two CPUs, a dashboard because Ray Train watches its runs through it."""
    import ray

    connect_ray(dashboard=True, num_cpus=2)
    yield
    ray.shutdown()
