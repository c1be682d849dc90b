"""The loss of all steps together, a few target tokens at a time.

The recurrence feeds hidden states forward and no logits, so nothing needs the
logits of a step before the unroll has ended. What the target says at a token is then
formed once and compared with every step that predicts it, and the gradient of a
chunk's logits is used up before the next chunk is made: no more than one is ever
in memory.

Shapes: N = B * T tokens of the flattened batch, R computed anchors, K steps, C
tokens of a chunk, M = K * C, H hidden size, Vd draft vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..data.batch import Batch
from ..layers.computed_rows import Rows
from ..layers.linear import product
from .divergences import LossName, row_losses
from .target_distribution import Labels, Vocabulary, labels

_CPU_ROWS, _GPU_ROWS = 512, 4096
"""Rows of a chunk: few enough for a CPU's cache, enough that what a chunk adds to the head's gradient is worth the
pass over it."""
_TILE = 16
"""Tokens of a chunk are a multiple of it: whole tiles of the matrix product, and few sizes to compile code for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What the steps are compared with, and what counts."""

    batch: Batch
    rows: Rows
    anchors: torch.Tensor
    """(K, N) bool, anchors of each step"""
    weights: torch.Tensor
    """(K,) float32, of each label in the loss: the step's weight over the labels of the whole global batch"""
    vocabulary: Vocabulary
    loss: LossName
    dtype: torch.dtype
    """Matrices are multiplied in it."""
    with_metrics: bool
    """Whether proposals and overlaps are wanted; they cost as much as a tenth of the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResults:
    """What the comparison found, without gradients."""

    sums: torch.Tensor
    """(K,) float32, losses summed over the labels of each step"""
    counts: torch.Tensor
    """(K,) float32, labels of each step"""
    proposed: torch.Tensor
    """(K, N) int64, the target id of the draft's best token at each anchor; -1 where it was not looked at"""
    overlap: torch.Tensor
    """(K,) float32, Σ min(p, q) over the anchors of each step, p over the target's full vocabulary"""


def joint_loss(
    outputs: list[torch.Tensor], head: torch.Tensor, comparison: Comparison
) -> tuple[torch.Tensor, StepResults]:
    """Return the weighted loss, a scalar with gradients for ``outputs`` and ``head``, and what was found.

    ``outputs`` are the normed hidden states (R, H) of the K steps, ``head`` (Vd, H) gives the draft's logits.
    """
    results = StepResults(
        sums=torch.zeros_like(comparison.weights),
        counts=torch.zeros_like(comparison.weights),
        proposed=torch.full_like(comparison.anchors, -1, dtype=torch.int64),
        overlap=torch.zeros_like(comparison.weights),
    )
    total: torch.Tensor = _JointLoss.apply(head, comparison, results, torch.is_grad_enabled(), *outputs)  # type: ignore[no-untyped-call]
    return total, results


class _JointLoss(torch.autograd.Function):
    """Forms the gradients while it has the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        head: torch.Tensor,
        comparison: Comparison,
        results: StepResults,
        is_training: bool,
        *outputs: torch.Tensor,
    ) -> torch.Tensor:
        # Asked for even where autograd is off.
        needs_head, *of_outputs = (
            is_training and each for each in (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        )
        needs_outputs = any(of_outputs)
        weight = head.to(comparison.dtype)
        chunks = _Chunks(comparison, results, outputs, weight)
        R, H = outputs[0].shape
        # A row more, for what is not computed.
        grad_outputs = [each.new_zeros(R + 1, H) for each in outputs] if needs_outputs else []
        grad_head = torch.zeros_like(head) if needs_head else None
        for chunk in chunks.cut():
            slope = chunks.compare(chunk, needs_grad=needs_outputs or needs_head)
            if slope is None:
                continue
            scale = chunk.scale[:, None]
            if needs_outputs:
                parts = (product(slope, weight.T) * scale).chunk(len(outputs))
                for grad, row, part in zip(grad_outputs, chunk.row, parts, strict=True):
                    grad.index_copy_(0, row, part.to(grad.dtype))
            if grad_head is not None:
                scaled = chunk.hidden * scale
                if grad_head.dtype == slope.dtype:
                    grad_head.addmm_(slope.T, scaled)
                else:
                    grad_head += slope.T @ scaled
        ctx.grads = (
            [grad_head, None, None, None, *(grad[:R] for grad in grad_outputs)]
            if needs_outputs
            else [grad_head, None, None, None, *[None] * len(outputs)]
        )
        return (results.sums * comparison.weights).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: the head's is as large as the head.
        return tuple(None if each is None else each.mul_(grad) for each in ctx.grads)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """Some tokens (C,), and the anchors that predict from them."""

    tokens: torch.Tensor
    row: torch.Tensor
    """(K, C) int64, R where a step has no anchor there"""
    is_anchor: torch.Tensor
    """(K, C) bool"""
    has_label: torch.Tensor
    """(K, C) bool"""
    scale: torch.Tensor
    """(M,), of each row in the loss"""
    hidden: torch.Tensor
    """(M, H); anything where there is no anchor: its scale is 0"""


class _Chunks:
    """Cuts the tokens that some step predicts from, and compares the steps with each cut."""

    def __init__(
        self, comparison: Comparison, results: StepResults, outputs: tuple[torch.Tensor, ...], weight: torch.Tensor
    ) -> None:
        self._comparison, self._results, self._weight = comparison, results, weight
        self._outputs = [each.to(comparison.dtype) for each in outputs]
        anchors, rows = comparison.anchors, comparison.rows
        K, N = anchors.shape
        R = len(rows.flat)
        # Anchors by the token that their step predicts from.
        is_anchor = torch.zeros_like(anchors)
        row = torch.full_like(anchors, R, dtype=torch.int64)
        for step in range(K):
            is_anchor[step, step + 1 :] = anchors[step, : N - step - 1]
            row[step, step + 1 :] = torch.where(anchors[step], rows.of, R)[: N - step - 1]
        tokens = is_anchor.any(0).nonzero().flatten()
        # A token more than once, to fill the last tile; only the first time it counts.
        self._tokens = torch.cat((tokens, tokens[:1].expand(-len(tokens) % _TILE)))
        self._is_anchor, self._row = is_anchor[:, self._tokens], row[:, self._tokens]
        self._is_anchor[:, len(tokens) :], self._row[:, len(tokens) :] = False, R
        best = comparison.batch.argmax.flatten()[self._tokens]
        self._has_label = self._is_anchor & comparison.vocabulary.t2d[best]
        results.counts.copy_(self._has_label.sum(1))
        self._scale = (self._has_label * comparison.weights[:, None]).to(comparison.dtype)
        self._room: dict[str, torch.Tensor] = {}

    def cut(self) -> Iterator[_Chunk]:
        """Yield the chunks, with what the draft has for each."""
        K = len(self._outputs)
        last = max(len(self._comparison.rows.flat) - 1, 0)
        size = _chunk_tokens(K, self._weight.device.type)
        for first in range(0, len(self._tokens), size):
            span = slice(first, first + size)
            row = self._row[:, span]
            chosen = [
                each.index_select(0, index) for each, index in zip(self._outputs, row.clamp(max=last), strict=True)
            ]
            yield _Chunk(
                tokens=self._tokens[span],
                row=row,
                is_anchor=self._is_anchor[:, span],
                has_label=self._has_label[:, span],
                scale=self._scale[:, span].flatten(),
                hidden=torch.cat(chosen),
            )

    def compare(self, chunk: _Chunk, *, needs_grad: bool) -> torch.Tensor | None:
        """Add to the results; return the gradient (M, Vd) of the losses' sum, each row's with weight 1."""
        comparison = self._comparison
        target = labels(comparison.batch, chunk.tokens, comparison.vocabulary, comparison.dtype)
        narrow = product(chunk.hidden, self._weight)
        logits = narrow if narrow.dtype == torch.float32 else self._take_room("logits", chunk).copy_(narrow)
        if comparison.with_metrics:
            self._measure(chunk, logits, target)
        if comparison.loss == "cross_entropy" and target.ids is None:
            q = self._take_room("probabilities", chunk)
            losses = _exact_cross_entropy(logits, target.logits.softmax(-1), q)
            slope = q if needs_grad else None
        else:
            losses, slope = _by_autograd(logits, target, comparison.loss, needs_grad=needs_grad)
        counted = losses.view_as(chunk.has_label).masked_fill(~chunk.has_label, 0)
        self._results.sums.add_(counted.sum(1))
        if slope is None or slope.dtype == comparison.dtype:
            return slope
        return narrow.copy_(slope)

    def _take_room(self, name: str, chunk: _Chunk) -> torch.Tensor:
        """Return memory (M, Vd) float32, the same for every chunk: new pages cost as much as writing to them."""
        M = len(chunk.hidden)
        room = self._room.get(name)
        if room is None or len(room) < M:
            room = self._room[name] = self._weight.new_empty(M, len(self._weight), dtype=torch.float32)
        return room if len(room) == M else room[:M]

    def _measure(self, chunk: _Chunk, logits: torch.Tensor, target: Labels) -> None:
        best = self._comparison.vocabulary.target_ids(logits.argmax(-1)).view_as(chunk.row)
        step, column = chunk.is_anchor.nonzero(as_tuple=True)
        self._results.proposed[step, chunk.tokens[column] - step - 1] = best[step, column]
        self._results.overlap.add_((target.overlap(logits).view_as(chunk.is_anchor) * chunk.is_anchor).sum(1))


def _exact_cross_entropy(logits: torch.Tensor, p: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return -Σ p log q = log Σ e^z - Σ p z (M,), over the whole draft vocabulary, and its gradient q - p in ``slope``.

    ``logits`` and ``slope`` (M, Vd), ``p`` (C, Vd).
    """
    by_step = torch.unflatten(logits, 0, (-1, len(p)))  # (K, C, Vd)
    q = torch.softmax(logits, -1, out=slope)
    # The largest q is at least 1 / Vd, so its logarithm loses nothing.
    log_sum = logits.amax(-1) - q.amax(-1).log()
    along = torch.bmm(by_step.transpose(0, 1), p[:, :, None])[:, :, 0].T  # (K, C)
    q.view_as(by_step).sub_(p)
    return log_sum - along.flatten()


def _by_autograd(
    logits: torch.Tensor, target: Labels, loss: LossName, *, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    log_p = target.logits.log_softmax(-1).repeat(len(logits) // len(target.logits), 1)
    with torch.set_grad_enabled(needs_grad):
        logits = logits.detach().requires_grad_(needs_grad)
        losses = row_losses(loss, target.outcomes(logits), log_p)
        slope = torch.autograd.grad(losses.sum(), logits)[0] if needs_grad else None
    return losses.detach(), slope


def _chunk_tokens(steps: int, device: str) -> int:
    """Return how many tokens make a chunk."""
    return max(_TILE, (_CPU_ROWS if device == "cpu" else _GPU_ROWS) // steps // _TILE * _TILE)
