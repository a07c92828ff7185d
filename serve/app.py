"""The endpoint: ``serve run serve.app:build checkpoint=<checkpoint or run> [<field of ServeConfig>=<value> ...]``."""

from ray import serve

from mp3d.config import ServeConfig
from mp3d.serving.deployment import build_application


def build(args: ServeConfig) -> serve.Application:
    return build_application(args)
