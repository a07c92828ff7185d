"""The two Serve deployments: a gateway that receives and answers, and detectors that compute, one request at a time.

    HTTP ─► Gateway (create_api) ─► handle ─► Detector (Engine)

What a request may ask for is decided in the gateway before a detector sees it; a full queue is answered with 503 and
Retry-After. Nothing here logs a request's content, a UID or a name.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mp3d.checkpoint import open_checkpoint
from mp3d.config import ServeConfig
from mp3d.errors import CheckpointError
from mp3d.operating_points import reporting_threshold
from mp3d.predict import Predictor
from mp3d.serving.api import RETRY_AFTER_S, create_api
from mp3d.serving.engine import Engine, answer_or_error, model_out
from mp3d.serving.schema import Answer, ErrorOut, ModelOut, Rejected

WAITING_REQUESTS = 8
"""Requests that wait for a detector; the next one is told to come again."""


def build_application(config: ServeConfig) -> serve.Application:
    """Gateway and detectors of a checkpoint, which is verified here: a replica that cannot start is tried for ever.

    Raises:
        CheckpointError: no intact checkpoint of a detector there.
        ConfigError: the checkpoint has operating points, but not the one asked for.
    """
    checkpoint = open_checkpoint(config.checkpoint)
    model = model_out(checkpoint)
    threshold, _ = reporting_threshold(checkpoint, config.score_threshold, config.fps_per_image)
    pinned = config.override({"checkpoint": str(checkpoint.path.resolve()), "score_threshold": threshold})
    detector = Detector.options(
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    )
    return Gateway.bind(detector.bind(pinned.model_dump(), model.model_dump()), pinned.model_dump(), model.model_dump())


@serve.deployment(
    max_ongoing_requests=1,
    max_queued_requests=WAITING_REQUESTS,
    health_check_period_s=10,
    graceful_shutdown_timeout_s=20,
)
class Detector:
    """Holds the model.

    Args:
        config: a :class:`ServeConfig` as plain data, its checkpoint an absolute path.
        model: the :class:`ModelOut` of that checkpoint, as plain data.
    """

    def __init__(self, config: dict[str, Any], model: dict[str, Any]) -> None:
        settings, expected = ServeConfig.model_validate(config), ModelOut.model_validate(model)
        checkpoint = open_checkpoint(settings.checkpoint)
        if checkpoint.digest != expected.digest:
            raise CheckpointError(
                f"{checkpoint.path} is no longer what it was when the application was built; deploy again"
            )
        device = "gpu" if settings.gpus_per_replica else "cpu"
        predictor = Predictor.open(checkpoint, device, settings.mode, settings.compile, settings.phases)
        self.engine = Engine(predictor, expected, settings)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="detector")

    async def detect(self, body: bytes, threshold: float | None) -> Answer | ErrorOut:
        """Computes in a thread, for the health checks' sake; stops at the next batch once the client is gone."""
        gone = threading.Event()

        def stop_if_gone(_done: int, _total: int) -> None:
            if gone.is_set():
                raise asyncio.CancelledError

        work = asyncio.get_running_loop().run_in_executor(
            self.thread, answer_or_error, self.engine, body, threshold, stop_if_gone
        )
        try:
            return await work
        finally:
            gone.set()

    def check_health(self) -> None:
        self.engine.predictor.check()


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=100,
    max_queued_requests=100,
    backpressure_config={"status_code": 503, "retry_after_s": RETRY_AFTER_S},
    health_check_period_s=10,
)
@serve.ingress()
class Gateway:
    """Receives requests within the limits and hands them to a detector. Arguments as of :class:`Detector`."""

    def __init__(self, detector: DeploymentHandle, config: dict[str, Any], model: dict[str, Any]) -> None:
        self.detector = detector.options(method_name="detect")
        self.config, self.model = ServeConfig.model_validate(config), ModelOut.model_validate(model)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self.detect, self.model, self.config, ready=self.detector.running_replicas_populated)

    async def detect(self, body: bytes, threshold: float | None) -> Answer:
        try:
            answer = await self.detector.remote(body, threshold)
        except (BackPressureError, DeploymentUnavailableError, RayActorError) as error:
            raise Rejected("BUSY", f"no detector is free ({type(error).__name__}); come again") from error
        if isinstance(answer, ErrorOut):
            raise Rejected(answer.reason, answer.detail)
        return answer
