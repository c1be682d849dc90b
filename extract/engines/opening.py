"""Choosing the engine of a run and making it."""

from typing import Any

import torch

from ...storage.schema import DatasetInfo
from ...storage.store import FeatureStore
from ...storage.writer import FeatureWriter
from ..config import ExtractConfig
from ..target import Target
from . import Engine, EngineError


def open_engine(config: ExtractConfig, target: Target, info: DatasetInfo) -> Engine:
    """Return the engine, or the many in one, that write to the store of ``config``.

    Only the library of the chosen engine is imported. Raises SpecxError if it cannot be had.
    """
    if config.workers > 1 or config.ray_address is not None:
        return _many_engines(config, target, info)
    if config.engine == "vllm" or (config.engine == "auto" and torch.cuda.is_available()):
        from .vllm import VllmEngine

        return VllmEngine(
            target,
            info,
            config.store,
            max_length=min(config.max_length or target.max_length, target.max_length),
            tokens_per_part=config.tokens_per_part,
            queue_bytes=config.queue_bytes,
            options=_vllm_options(config),
        )
    from .transformers import TransformersEngine

    writer = FeatureWriter(FeatureStore.open(config.store), tokens_per_part=config.tokens_per_part)
    return TransformersEngine(target, info, writer, device=config.device, queue_bytes=config.queue_bytes)


def _many_engines(config: ExtractConfig, target: Target, info: DatasetInfo) -> Engine:
    try:
        from .ray import RayEngine
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise EngineError(
            "several workers need Ray, which is not installed. `pip install specx[ray]`, or use --workers 1."
        ) from error
    return RayEngine(config, target, info)


def _vllm_options(config: ExtractConfig) -> dict[str, Any]:
    return {
        **config.engine_options,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "enable_expert_parallel": config.expert_parallel,
    }
