"""What is kept of a target's outputs, reduced on its device before anything is copied.

Logits are made a few rows at a time and dropped at once: a gpt-oss row is 800 KB
in float32, its top 128 are 768 bytes.

Shapes: T tokens, L boundaries, H hidden size, V vocabulary, K logits kept per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...storage.schema import Array, DatasetInfo, SequenceFeatures
from ..data.samples import Sample

_LOGIT_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Float32 logits held at once: what stays in a CPU's cache, and what a GPU spares beside the model."""


class NonfiniteOutputsError(Exception):
    """The target gave NaN or infinity for a sample; its row is rejected with this message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Outputs of the target for one sequence or some rows of it, on one device."""

    aux_hidden: torch.Tensor
    """(T, L, H) in the type the target runs in"""
    last_hidden: torch.Tensor | None = None
    """(T, H) in the type the target runs in, after the final norm; None where it is not kept"""
    topk_ids: torch.Tensor
    """(T, K) int32, by falling logit"""
    topk_logprob: torch.Tensor
    """(T, K) float16, logit minus log-sum-exp"""
    lse: torch.Tensor
    """(T,) float32"""
    argmax: torch.Tensor
    """(T,) int32"""
    finite: torch.Tensor
    """(3,) bool: hidden states, last hidden state, logits"""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors there are, by name."""
        tensors = {name: getattr(self, name) for name in self.__slots__}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def cpu(self) -> "Outputs":
        """Return the same on the CPU."""
        return Outputs(**{name: tensor.cpu() for name, tensor in self.tensors().items()})

    def features(self, sample: Sample) -> SequenceFeatures:
        """Return what goes to disk of tensors on the CPU; raise NonfiniteOutputsError."""
        names = ("hidden states", "last hidden state", "logits")
        for name, finite in zip(names, self.finite.tolist(), strict=True):
            if not finite:
                raise NonfiniteOutputsError(f"the target's {name} are not finite in {self.aux_hidden.dtype}")
        return SequenceFeatures(
            input_ids=sample.input_ids,
            loss_mask=sample.loss_mask,
            aux_hidden=_bfloat16_bits(self.aux_hidden),
            last_hidden=None if self.last_hidden is None else _bfloat16_bits(self.last_hidden),
            topk_ids=self.topk_ids.numpy().view(np.uint32),
            topk_logprob=self.topk_logprob.numpy(),
            lse=self.lse.numpy(),
            argmax=self.argmax.numpy(),
        )


def reduce_outputs(
    aux_hidden: torch.Tensor,
    last_hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor | None],
    *,
    info: DatasetInfo,
) -> Outputs | None:
    """Return what a store keeps of hidden states (T, L, H) and (T, H).

    ``head`` gives logits (rows, V) of last hidden states (rows, H); where it gives None, as it
    does on all ranks but one of a tensor-parallel target, there is nothing to return.
    """
    rows = max(1, _LOGIT_BYTES[last_hidden.device.type] // (4 * info.vocab_size))
    parts = []
    for start in range(0, len(last_hidden), rows):
        logits = head(last_hidden[start : start + rows])
        if logits is not None:
            parts.append(_top(logits.float(), info.top_k))
    if not parts:
        return None
    topk_ids, topk_logprob, lse, argmax = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Outputs(
        aux_hidden=aux_hidden,
        last_hidden=last_hidden if info.last_hidden else None,
        topk_ids=topk_ids,
        topk_logprob=topk_logprob,
        lse=lse,
        argmax=argmax,
        finite=torch.stack([torch.isfinite(values).all() for values in (aux_hidden, last_hidden, lse)]),
    )


def _top(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    """Return top-K ids and logprobs (rows, K), log-sum-exp and argmax (rows,); ``logits`` is overwritten."""
    values, ids = logits.topk(top_k)
    highest = values[:, :1]
    # The first of equals, as torch.argmax has it, without another pass over the vocabulary.
    argmax = torch.where(values == highest, ids, logits.shape[1]).amin(-1)
    lse = logits.sub_(highest).exp_().sum(-1).log_().add_(highest[:, 0])
    return ids.int(), (values - lse[:, None]).half(), lse, argmax.int()


def _bfloat16_bits(values: torch.Tensor) -> Array:
    return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
