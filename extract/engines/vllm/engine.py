"""The target in vLLM: batched, on one GPU or many; the default where a GPU is found.

vLLM computes a prompt's hidden states as it prefills it; one more token is asked
for, as a request must have one. The store is written where the hidden states are,
by ``connector``; here requests are made and counts come back.
"""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from ....storage.catalog.sequence_id import sequence_id
from ....storage.schema import DatasetInfo, Reject
from ...data.samples import Sample
from ...target import Target
from ..base import EngineError
from ..sink import Outcome
from .process import engine_errors, start_vllm

_IN_FLIGHT_BATCHES = 3
"""Requests given to vLLM ahead of their turn, in units of what it runs at once."""

_ASK_EVERY_S = 1.0

_CONNECTOR = f"{__package__}.connector"


class VllmExtractionEngine:
    """Runs a target in vLLM's own processes, which write the store."""

    def __init__(
        self,
        target: Target,
        info: DatasetInfo,
        store: str,
        *,
        max_length: int,
        tokens_per_part: int,
        queue_bytes: int,
        options: Mapping[str, Any],
    ) -> None:
        """Load the target; ``options`` are vLLM's own engine arguments. Raises EngineError, SpecxError."""
        stages = options.get("pipeline_parallel_size", 1)
        if stages > 1:
            # vLLM 0.32 says it of "this model", which a user would take for the target.
            raise EngineError(
                f"--pipeline-parallel {stages}: vLLM takes hidden states out of one pipeline stage only. "
                f"Use --tensor-parallel, or --engine transformers."
            )
        self._llm = start_vllm(target, _arguments(target, info, max_length, options))
        self._sampling = _sampling()
        config = self._llm.llm_engine.vllm_config.scheduler_config
        self._in_flight_limit = _IN_FLIGHT_BATCHES * int(config.max_num_seqs)
        self._in_flight = self._requests = 0
        self._rejects: list[Reject] = []
        self._outcome = Outcome()
        self._last_asked = time.monotonic()
        problems = self._call("specx_open", store, tokens_per_part, queue_bytes)
        if any(problems):
            self.close()
            raise EngineError(next(filter(None, problems)))

    def add(self, sample: Sample) -> None:
        """Give vLLM a sample, and run it until it can take another."""
        origin = sample.origin
        self._submit(
            sample.input_ids.tolist(),
            {
                "id": sequence_id(sample.input_ids),
                "loss_mask": sample.loss_mask.tobytes(),
                "source": origin.source,
                "row": origin.row,
                "category": origin.category,
                "rejects": [reject.model_dump() for reject in self._rejects],
            },
        )
        self._rejects.clear()
        self._run_down_to(self._in_flight_limit - 1)

    def reject(self, reject: Reject) -> None:
        self._rejects.append(reject)

    def take(self) -> Outcome:
        """Return what became of the samples; vLLM's processes are asked about once a second."""
        if time.monotonic() - self._last_asked >= _ASK_EVERY_S:
            self._ask(finish=False)
        outcome, self._outcome = self._outcome, Outcome()
        return outcome

    def finish(self) -> None:
        self._run_down_to(0)
        # A request's hidden states are read in the step after its last: this one makes that step happen.
        self._submit([0, 0], None)
        self._run_down_to(0)
        self._ask(finish=True)

    def close(self) -> None:
        with contextlib.suppress(EngineError):
            # A dead process has nothing to give back.
            self._call("specx_close")
        self._llm.llm_engine.engine_core.shutdown()

    def _submit(self, ids: list[int], params: dict[str, Any] | None) -> None:
        sampling = self._sampling.clone()
        if params is not None:
            sampling.extra_args = {"kv_transfer_params": {"specx": params}}
        with engine_errors():
            self._llm.llm_engine.add_request(str(self._requests), {"prompt_token_ids": ids}, sampling)
        self._requests += 1
        self._in_flight += 1

    def _run_down_to(self, in_flight: int) -> None:
        """Run the target until no more than so many requests are in flight."""
        with engine_errors():
            while self._in_flight > in_flight:
                self._in_flight -= sum(output.finished for output in self._llm.llm_engine.step())

    def _ask(self, *, finish: bool) -> None:
        (answer,) = [each for each in self._call("specx_take", finish) if each is not None]
        self._last_asked = time.monotonic()
        if "error" in answer:
            raise EngineError(answer["error"])
        self._outcome.add(Outcome(**answer | {"rejects": [Reject(**reject) for reject in answer["rejects"]]}))

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of ``FeatureWorker`` in every worker."""
        with engine_errors():
            return list(self._llm.collective_rpc(method, args=arguments))


def _arguments(target: Target, info: DatasetInfo, max_length: int, options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        # Room for the outputs beside the model and its cache.
        "gpu_memory_utilization": 0.85,
        **options,
        "dtype": info.compute_dtype,
        # The token asked for, and the one that vLLM thinks could be drafted behind it.
        "max_model_len": max_length + 2,
        "enable_prefix_caching": False,
        "worker_extension_cls": f"{_CONNECTOR}.FeatureWorker",
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {
                # The last one is the output of the last block, before the final norm.
                "hf_config": {"eagle_aux_hidden_state_layer_ids": [*info.boundaries, target.num_layers]}
            },
        },
        "kv_transfer_config": {
            "kv_connector": "FeatureConnector",
            "kv_connector_module_path": _CONNECTOR,
            "kv_role": "kv_producer",
        },
    }


def _sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
