"""Small tasks answered on Ray by a pool of actors, each of which holds the model."""

from collections.abc import Iterator, Sequence
from typing import Any

from mp3d.data.part import quiet_ray_data
from mp3d.device import DeviceName
from mp3d.launch import check_resources, connect_ray, worker_resources


def answers_of_actors(
    actor: type,
    settings: dict[str, Any],
    tasks: Sequence[dict[str, Any]],
    *,
    num_workers: int,
    cpus_per_worker: float,
    accelerator: DeviceName,
) -> Iterator[dict[str, Any]]:
    """The rows that the tasks become, in their order.

    Args:
        actor: ``actor(settings)`` is called with one task and returns its rows, all plain values.

    Raises:
        ResourceError: the cluster cannot hold so many workers.
    """
    import ray.data

    connect_ray()
    quiet_ray_data()
    worker = worker_resources(cpus_per_worker, accelerator)
    check_resources([worker] * num_workers)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    answered = ray.data.from_items(list(tasks), override_num_blocks=len(tasks)).flat_map(
        actor,  # type: ignore[arg-type]  # a class: one instance an actor
        fn_constructor_args=[settings],
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=cpus_per_worker,
        num_gpus=worker.get("GPU", 0),
    )
    yield from answered.iter_rows()
