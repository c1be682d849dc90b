"""The target in transformers: exact and simple, the default on a CPU.

Samples run one at a time and without padding, so that a sequence's features are
the same to the bit whatever else is in the data.

Shapes: T tokens, L boundaries, H hidden size, V vocabulary, K logits kept per token.
"""

from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ...storage.schema import Array, SequenceFeatures
from ..samples import Sample
from ..target import Target, TargetError
from . import NotFiniteError

_LOGIT_ROWS = 1024
"""Rows of logits held at once: a gpt-oss row is 800 KB in float32."""


class TransformersEngine:
    """Runs a target on one device."""

    def __init__(
        self,
        target: Target,
        *,
        boundaries: tuple[int, ...],
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._boundaries = boundaries
        self._top_k = top_k
        self._device = device
        model = _load(target, dtype)
        model.to(device).eval()
        self._decoder, self._lm_head = model.get_submodule("model"), model.get_submodule("lm_head")

    @torch.inference_mode()
    def features(self, sample: Sample) -> SequenceFeatures:
        """Return the features of one sample; raise NotFiniteError if a value is NaN or infinite."""
        ids = torch.from_numpy(sample.input_ids).to(self._device, torch.int64)[None]  # (1, T)
        output = self._decoder(input_ids=ids, output_hidden_states=True, use_cache=False)
        aux = torch.stack([output.hidden_states[b][0] for b in self._boundaries], dim=1)  # (T, L, H)
        last = output.last_hidden_state[0]  # (T, H)
        logprob, top_ids, lse, argmax = (torch.cat(parts) for parts in zip(*self._logits(last), strict=True))
        for name, values in (("hidden states", aux), ("last hidden state", last), ("logits", lse)):
            if not torch.isfinite(values).all():
                raise NotFiniteError(f"the target's {name} are not finite in {last.dtype}")
        return SequenceFeatures(
            input_ids=sample.input_ids,
            loss_mask=sample.loss_mask,
            aux_hidden=_bfloat16_bits(aux),
            last_hidden=_bfloat16_bits(last),
            topk_ids=top_ids.cpu().numpy().astype(np.uint32),
            topk_logprob=logprob.cpu().numpy().astype(np.float16),
            lse=lse.cpu().numpy(),
            argmax=argmax.cpu().numpy().astype(np.int32),
        )

    def _logits(self, last: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        chunks: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, len(last), _LOGIT_ROWS):
            rows = last[start : start + _LOGIT_ROWS]
            logits = self._lm_head(rows).float()  # (rows, V)
            lse = logits.logsumexp(-1)
            values, ids = logits.topk(self._top_k)
            chunks.append((values - lse[:, None], ids, lse, logits.argmax(-1)))
        return chunks


def _load(target: Target, dtype: torch.dtype) -> nn.Module:
    options = {"dtype": dtype, "local_files_only": True}
    try:
        # transformers fills what is missing with random numbers, and only warns.
        result: Any = AutoModelForCausalLM.from_pretrained(
            target.path, **options, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TargetError(f"{target.path}: transformers cannot load it: {reason}. Is config.json whole?") from error
    model, loaded = result
    wrong = sorted(loaded["missing_keys"]) + sorted(name for name, *_ in loaded["mismatched_keys"])
    if wrong:
        raise TargetError(
            f"{target.path}: {len(wrong)} weights are missing or of another shape than config.json says, "
            f"first {wrong[0]}. Download the model again."
        )
    return cast(nn.Module, model)


def _bfloat16_bits(values: torch.Tensor) -> Array:
    bits = values.to(torch.bfloat16).contiguous().view(torch.int16)
    return bits.cpu().numpy().view(np.uint16)
