"""Choosing the engine of a run and making it."""

import os

from ...storage.schema import DatasetInfo
from ..config import ExtractConfig
from ..target import Target
from .base import EngineError, ExtractionEngine
from .single import open_single_engine

# Read by Ray when it is imported and when it starts. Of a worker that was killed, the processes it had started
# (vLLM's) must not live on with its GPU. That it ended is told once, by us: Ray's lines would go to stdout.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_process_group_cleanup_enabled": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def open_engine(config: ExtractConfig, target: Target, info: DatasetInfo) -> ExtractionEngine:
    """Return the engine, or the many in one, that write to the store of ``config``.

    Only the library of the chosen engine is imported. Raises SpecxError if it is not available.
    """
    if config.workers > 1 or config.ray_address is not None:
        return _many_engines(config, target, info)
    return open_single_engine(config, target, info)


def _many_engines(config: ExtractConfig, target: Target, info: DatasetInfo) -> ExtractionEngine:
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from .ray.engine import RayEngine
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise EngineError(
            "several workers need Ray, which is not installed. `pip install specx[ray]`, or use --workers 1."
        ) from error
    return RayEngine(config, target, info)
