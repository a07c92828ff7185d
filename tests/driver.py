"""A run in a process with a Ray of its own, for tests that kill processes or nodes.

python -m tests.driver CONFIG [lose-a-node [replace-it]]
"""

import os
import socket
import sys
import threading
import time
from pathlib import Path

import torch

from mp3d import cli
from mp3d.config import TrainConfig
from mp3d.launch import connect_ray, run_training, set_ray_environment

QUICK = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}
"""A lost node is noticed within seconds."""


def main() -> int:
    text, *faults = sys.argv[1:]
    config = TrainConfig.model_validate_json(text)
    torch.set_num_threads(1)
    if "lose-a-node" in faults:
        return on_two_nodes(config, replaced="replace-it" in faults)
    if config.launch.runner == "ray":
        connect_ray(dashboard=True, num_cpus=2)
    run_training(config)
    return 0


def on_two_nodes(config: TrainConfig, *, replaced: bool) -> int:
    """Two nodes of one CPU; the second is lost after the first epoch, and another one comes or does not."""
    os.environ.update(QUICK)
    set_ray_environment()
    import ray
    from ray.cluster_utils import Cluster

    room = {"num_cpus": 1, "object_store_memory": 10**8}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dashboard = {"include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args={**room, **dashboard})
    second = cluster.add_node(**room)
    ray.init(address=cluster.address, logging_level="WARNING")
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            run_training(config)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    first_epoch = Path(config.launch.storage_path) / config.name / "epoch_0001"
    while thread.is_alive() and not first_epoch.exists():
        time.sleep(0.05)
    cluster.remove_node(second, allow_graceful=False)
    print("a node is lost", flush=True)
    if replaced:
        cluster.add_node(**room)
    thread.join()
    ray.shutdown()
    cluster.shutdown()
    if outcome[0] is not None:
        raise outcome[0]
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
