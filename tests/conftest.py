"""What the tests share: one Ray for the whole run, one tiny world, nothing of this machine's user."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# before anything imports torch or Ray
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(autouse=True, scope="session")
def private_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and tokens of the tests live in a folder of their own."""
    home = tmp_path_factory.mktemp("home")
    os.environ["MP3D_ID_KEY_FILE"] = str(home / "id_key")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(home / "auth_token")
    return home


@pytest.fixture(scope="session")
def ray_cluster(private_home: Path) -> Iterator[None]:
    """The one local Ray of the test run: two CPUs, a dashboard because Ray Train watches its runs through it."""
    import ray

    from mp3d.launch import connect_ray

    os.environ.pop("RAY_ADDRESS", None)
    connect_ray(dashboard=True, num_cpus=2)
    yield
    ray.shutdown()
