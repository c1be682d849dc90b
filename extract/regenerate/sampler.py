"""Answers of the target, sampled in vLLM, with the ids exactly as they were sampled.

Shapes: T tokens of a prompt, A tokens of an answer.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...storage.schema import Array
from ..engines.base import EngineError
from ..engines.vllm.process import engine_errors, start_vllm
from ..engines.vllm.worker import FollowingWorker
from ..target import Target
from .prompts import RegenerationPrompt

_IN_FLIGHT_BATCHES = 2
"""Prompts given to vLLM ahead of their turn, in units of what it runs at once."""

_FINISHED = ("stop", "length")
"""How an answer may end; of the others vLLM has, none is an answer."""

_WORKER = f"{FollowingWorker.__module__}.{FollowingWorker.__qualname__}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the target said to one prompt."""

    prompt: RegenerationPrompt
    sampled: Array
    """(A,) int32, the end token included where it was sampled"""
    finish_reason: str
    """``stop``, or ``length`` where the answer was cut off"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the target samples."""

    temperature: float
    top_p: float
    top_k: int
    """0 is all."""
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""


class VllmSampler:
    """Answers prompts, many at a time."""

    def __init__(
        self,
        target: Target,
        sampling: Sampling,
        *,
        dtype: str,
        max_length: int,
        seed: int,
        options: Mapping[str, Any],
    ) -> None:
        """Load the target; ``options`` are vLLM's own engine arguments. Raises EngineError."""
        self._sampling = sampling
        self._max_length = max_length
        own = {"dtype": dtype, "max_model_len": max_length, "seed": seed, "worker_extension_cls": _WORKER}
        self._llm = start_vllm(target, {**options, **own})
        with engine_errors():
            self._llm.collective_rpc("specx_follow", args=(os.getpid(),))
        config = self._llm.llm_engine.vllm_config.scheduler_config
        self._in_flight_limit = _IN_FLIGHT_BATCHES * int(config.max_num_seqs)

    def answers(self, prompts: Iterable[RegenerationPrompt]) -> Iterator[Answer]:
        """Yield each prompt's answer as it is finished, taking prompts as there is room. Raises EngineError."""
        in_flight: dict[str, RegenerationPrompt] = {}
        for number, prompt in enumerate(prompts):
            in_flight[str(number)] = prompt
            with engine_errors():
                self._llm.llm_engine.add_request(
                    str(number), {"prompt_token_ids": prompt.input_ids.tolist()}, self._parameters(prompt)
                )
            while len(in_flight) >= self._in_flight_limit:
                yield from self._step(in_flight)
        while in_flight:
            yield from self._step(in_flight)

    def close(self) -> None:
        """Give back what vLLM holds."""
        self._llm.llm_engine.engine_core.shutdown()

    def _step(self, in_flight: dict[str, RegenerationPrompt]) -> Iterator[Answer]:
        with engine_errors():
            finished = [output for output in self._llm.llm_engine.step() if output.finished]
        for output in finished:
            (completion,) = output.outputs
            prompt, reason = in_flight.pop(output.request_id), str(completion.finish_reason)
            if reason not in _FINISHED:
                raise EngineError(
                    f"{prompt.source}: row {prompt.row}: vLLM gave up its answer ({reason}). "
                    "Finished answers are kept: rerun the same command."
                )
            yield Answer(prompt=prompt, sampled=np.asarray(completion.token_ids, np.int32), finish_reason=reason)

    def _parameters(self, prompt: RegenerationPrompt) -> Any:
        from vllm import SamplingParams

        sampling = self._sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=min(sampling.max_new_tokens, self._max_length - len(prompt.input_ids)),
            stop_token_ids=list(sampling.stop_ids),
            detokenize=False,
        )
