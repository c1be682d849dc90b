"""What the target says at some tokens, as distributions that a draft is compared with.

Exact where the store has the last hidden states; else its top-K tokens and one
bucket for all others.

Shapes: C tokens, H hidden size, V target vocabulary, Vd draft vocabulary, K stored
logits, M rows: the C tokens once for each step.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..data.batch import Batch
from ..data.target_head import HeadTransform
from ..layers.linear import product

IMPOSSIBLE = -1e30
"""Log-probability of what cannot be; its exponential is 0, and a difference of two is finite."""

_LEAST_TAIL = 1e-7
"""Of the probability: a bucket that rounding has emptied would forbid the draft what it holds."""


class Vocabulary(nn.Module):
    """The draft vocabulary and the target's head over it; constants of a run."""

    d2t: torch.Tensor
    t2d: torch.Tensor
    target_head: torch.Tensor

    def __init__(
        self,
        d2t: torch.Tensor,
        t2d: torch.Tensor,
        target_head: torch.Tensor,
        head_transform: HeadTransform | None = None,
    ) -> None:
        """``d2t`` (Vd,) int64 offsets, ``t2d`` (V,) bool, ``target_head`` (Vd, H): the target's rows."""
        super().__init__()
        self.head_transform = head_transform or HeadTransform()
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)
        # Comes from the store again on resume.
        self.register_buffer("target_head", target_head, persistent=False)

    def target_logits(self, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the target's logits (M, Vd) float32 over the draft vocabulary, of last hidden states (M, H)."""
        return self.head_transform(product(hidden.to(dtype), self.target_head.to(dtype)).float())

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Map draft ids to target ids, any shape."""
        return draft_ids + self.d2t[draft_ids]

    def draft_ids(self, target_ids: torch.Tensor) -> torch.Tensor:
        """Map target ids to draft ids, any shape; what is not in the draft vocabulary becomes Vd, one too large."""
        rank = self.t2d.cumsum(0) - 1  # ids of both vocabularies ascend alike
        return torch.where(self.t2d[target_ids], rank[target_ids], len(self.d2t))


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """The target's distributions at C tokens."""

    logits: torch.Tensor
    """(C, S) float32, of the outcomes compared: S = Vd, or K tokens and the bucket; their softmax is the label"""
    log_sum: torch.Tensor
    """(C, 1) float32: ``logits - log_sum`` are log-probabilities over the target's full vocabulary"""
    ids: torch.Tensor | None
    """(C, K) int64, draft ids of the outcomes, Vd for what the draft cannot propose; None where S = Vd"""

    def outcomes(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the draft's log-probabilities (M, S) of the outcomes, given its logits (M, Vd) float32.

        The rows are those of the C tokens, again and again.
        """
        log_q = logits.log_softmax(-1)
        if self.ids is None:
            return log_q
        Vd = logits.shape[1]
        ids = self.ids.repeat(len(logits) // len(self.ids), 1)
        # A column more, for ids that the draft cannot propose. 1 - Σ q over the top-K would cancel: the
        # others are summed.
        is_tail = torch.ones(len(ids), Vd + 1, dtype=torch.bool, device=ids.device).scatter(1, ids, False)[:, :Vd]
        tail = log_q.masked_fill(~is_tail, IMPOSSIBLE).logsumexp(-1, keepdim=True)
        known = log_q.gather(1, ids.clamp(max=Vd - 1)).masked_fill(ids == Vd, IMPOSSIBLE)
        # Where the top-K holds the whole draft vocabulary there is no bucket.
        return torch.cat((known, tail.masked_fill(~is_tail.any(-1, keepdim=True), IMPOSSIBLE)), dim=-1)

    def overlap(self, logits: torch.Tensor) -> torch.Tensor:
        """Return Σ min(p, q) of each row (M,), p over the target's full vocabulary, q from logits (M, Vd).

        The bucket is left out: which of its tokens agree is not known.
        """
        log_p = self.logits - self.log_sum
        log_q = torch.unflatten(self.outcomes(logits), 0, (-1, len(log_p)))
        known = slice(None) if self.ids is None else slice(self.ids.shape[1])
        return torch.minimum(log_q, log_p)[..., known].exp().sum(-1).flatten()


def labels(batch: Batch, tokens: torch.Tensor, vocabulary: Vocabulary, dtype: torch.dtype) -> Labels:
    """Return the labels of some tokens (C,) of the flattened batch; matrices are multiplied in ``dtype``."""
    if batch.last_hidden is not None:
        logits = vocabulary.target_logits(batch.last_hidden.flatten(0, 1)[tokens], dtype)
        return Labels(logits=logits, log_sum=batch.lse.flatten()[tokens][:, None], ids=None)
    assert batch.topk_ids is not None
    assert batch.topk_logprob is not None
    ids = vocabulary.draft_ids(batch.topk_ids.flatten(0, 1)[tokens])
    logprob = batch.topk_logprob.flatten(0, 1)[tokens].float()
    # L = -Σ p_i log q_i - r log q_tail: the mass r beyond the top-K is one bucket, and is taken as inside the draft
    # vocabulary; top-K tokens outside it are dropped and the rest renormalised.
    tail = (1 - logprob.exp().sum(-1, keepdim=True)).clamp(min=_LEAST_TAIL)
    is_known = ids < len(vocabulary.d2t)
    has_bucket = is_known.sum(-1, keepdim=True) < len(vocabulary.d2t)
    bucketed = torch.cat(
        (logprob.masked_fill(~is_known, IMPOSSIBLE), tail.log().masked_fill(~has_bucket, IMPOSSIBLE)), dim=-1
    )
    return Labels(logits=bucketed, log_sum=torch.zeros_like(tail), ids=ids)
