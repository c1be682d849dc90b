"""Choosing the engine of a run and making it."""

import os
from typing import Any

import torch

from ...storage.schema import DatasetInfo
from ...storage.store import FeatureStore
from ...storage.writer import FeatureWriter
from ..config import EngineSettings, ExtractConfig
from ..target import Target
from .base import EngineError, ExtractionEngine

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

    Only the library of the chosen engine is imported. Raises SpecxError if it cannot be had.
    """
    if config.workers > 1 or config.ray_address is not None:
        return _many_engines(config, target, info)
    if config.engine == "vllm" or (config.engine == "auto" and torch.cuda.is_available()):
        from .vllm.engine import VllmExtractionEngine

        return VllmExtractionEngine(
            target,
            info,
            config.store,
            max_length=min(config.max_length or target.max_length, target.max_length),
            tokens_per_part=config.tokens_per_part,
            queue_bytes=config.queue_bytes,
            options=vllm_options(config),
        )
    from .transformers_engine import TransformersEngine

    writer = FeatureWriter(FeatureStore.open(config.store), tokens_per_part=config.tokens_per_part)
    return TransformersEngine(target, info, writer, device=config.device, queue_bytes=config.queue_bytes)


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


def vllm_options(config: EngineSettings) -> dict[str, Any]:
    """Return the engine arguments that a run's settings ask vLLM for."""
    return {
        **config.engine_options,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "enable_expert_parallel": config.expert_parallel,
    }
