"""One engine of a run, in this process."""

from typing import Any

import torch

from ...storage.schema import DatasetInfo
from ...storage.store import FeatureStore
from ...storage.writer import FeatureWriter
from ..config import EngineSettings, ExtractConfig
from ..target import Target
from .base import ExtractionEngine


def open_single_engine(config: ExtractConfig, target: Target, info: DatasetInfo) -> ExtractionEngine:
    """Return the engine that writes to the store of ``config``; raises SpecxError if it is not available.

    Only the library of the chosen engine is imported.
    """
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


def vllm_options(config: EngineSettings) -> dict[str, Any]:
    """Return the engine arguments that a run's settings ask vLLM for."""
    return {
        **config.engine_options,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "enable_expert_parallel": config.expert_parallel,
    }
