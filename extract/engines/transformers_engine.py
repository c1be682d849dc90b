"""The target in transformers: exact and simple, the default on a CPU.

Samples run one at a time and without padding, so that a sequence's features are
the same to the bit whatever else is in the data.

Shapes: T tokens, L boundaries, H hidden size.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ...hub import TargetError
from ...storage.schema import DatasetInfo, Reject
from ...storage.writer import FeatureWriter
from ..data.samples import Sample
from ..target import Target
from .base import EngineError
from .outputs import reduce_outputs
from .sink import OnCpu, Outcome, Sink


class TransformersEngine:
    """Runs a target on one device, in this process."""

    def __init__(
        self, target: Target, info: DatasetInfo, writer: FeatureWriter, *, device: str, queue_bytes: int
    ) -> None:
        self._info = info
        self._device = _device(device)
        model = _load(target, getattr(torch, info.compute_dtype))
        model.to(self._device).eval()
        self._decoder, self._lm_head = model.get_submodule("model"), model.get_submodule("lm_head")
        self._sink = Sink(writer, queue_bytes=queue_bytes)

    @torch.inference_mode()
    def add(self, sample: Sample) -> None:
        """Run one sample."""
        ids = torch.from_numpy(sample.input_ids).to(self._device, torch.int64)[None]  # (1, T)
        output = self._decoder(input_ids=ids, output_hidden_states=True, use_cache=False)
        outputs = reduce_outputs(
            torch.stack([output.hidden_states[b][0] for b in self._info.boundaries], dim=1),  # (T, L, H)
            output.last_hidden_state[0],
            self._lm_head,
            info=self._info,
        )
        assert outputs is not None, "one process holds the whole head"
        self._sink.put(sample, OnCpu(outputs.cpu()))

    def reject(self, reject: Reject) -> None:
        self._sink.reject(reject)

    def take(self) -> Outcome:
        return self._sink.take()

    def finish(self) -> None:
        self._sink.finish()

    def close(self) -> None:
        self._sink.close()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EngineError(f"device {name!r} is not to be had here; use auto, cpu or cuda") from error
    return device


def _load(target: Target, dtype: torch.dtype) -> nn.Module:
    options = {"dtype": dtype, "local_files_only": True}
    try:
        # transformers fills what is missing with random numbers, and only warns.
        result: Any = AutoModelForCausalLM.from_pretrained(
            target.path, **options, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except ImportError as error:
        raise EngineError(f"{target.path}: transformers cannot load it: {_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{target.path}: transformers cannot load it: {_line(error)}. Is config.json whole?"
        ) from error
    model, loaded = result
    wrong = sorted(loaded["missing_keys"]) + sorted(name for name, *_ in loaded["mismatched_keys"])
    if wrong:
        raise TargetError(
            f"{target.path}: {len(wrong)} weights are missing or of another shape than config.json says, "
            f"first {wrong[0]}. Download the model again."
        )
    return cast(nn.Module, model)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
