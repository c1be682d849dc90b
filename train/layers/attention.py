"""The draft's attention: tiles over step 0, and the few later keys in closed form.

At step k anchor t sees the keys of step 0 up to its own, and its own keys of the
steps 1 to k. The first are a causal block, done in tiles as flash attention does it
(arXiv 2205.14135); the others are one key each, whose scores join the block by the
log-sum-exp:

    L = log(e^lse0 + Σ e^s_i),  out = out0 e^(lse0 - L) + Σ v_i e^(s_i - L)

The backward recomputes the probabilities of a tile from the joint L, which gives the
tile's exact share of the gradient.

Shapes: N tokens of the flattened batch, R computed anchors, n query heads, m key
heads, g = n / m, D head dimension, k later steps, r rows and c keys of a tile.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import torch

from .computed_rows import Rows

_TILE_ROWS = 128
"""At most: a causal tile computes half a square of so many scores in vain."""
_TILE_SCORES = 1 << 22
"""At most, where that leaves a row."""
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Rows ``first_row:stop_row`` against keys ``first_key:stop_key``."""

    first_row: int
    stop_row: int
    first_key: int
    stop_key: int
    mask: torch.Tensor
    """(r, at most c) float32, 0 or -inf, of the last keys; all see those before"""


def attend(
    q: torch.Tensor,
    first_keys: torch.Tensor,
    first_values: torch.Tensor,
    later_keys: list[torch.Tensor],
    later_values: list[torch.Tensor],
    rows: Rows,
    window: int | None,
) -> torch.Tensor:
    """Return what the computed anchors attend to, (R, n, D).

    ``q`` (R, n, D) is of step k = the number of ``later_keys`` and ``later_values``, each (R, m, D);
    ``first_keys`` and ``first_values`` (N, m, D) are those of step 0. With a ``window`` W the anchor t
    sees those behind t + k - W only, of step 0; W must exceed k.
    """
    if q.device.type == "cpu":
        tiles = list(_tiles(rows, len(later_keys), window, q.shape[1]))
        attended: torch.Tensor = _CpuAttention.apply(  # type: ignore[no-untyped-call]
            q, first_keys, first_values, tiles, *later_keys, *later_values
        )
        return attended
    return _flex_attend(q, first_keys, first_values, later_keys, later_values, rows, window)


def _tiles(rows: Rows, step: int, window: int | None, heads: int) -> Iterator[Tile]:
    for run in rows.runs:
        stop = run.first + run.stop_row - run.first_row
        longest = stop - run.document if window is None else min(stop - run.document, window + _TILE_ROWS)
        size = max(1, min(_TILE_ROWS, _TILE_SCORES // (heads * longest)))
        for first in range(run.first, stop, size):
            end = min(stop, first + size)
            first_key = run.document if window is None else max(run.document, first + step - window + 1)
            first_masked = first if window is None else first_key
            anchors, keys = torch.arange(first, end)[:, None], torch.arange(first_masked, end)
            is_hidden = keys > anchors
            if window is not None:
                is_hidden |= keys <= anchors + step - window
            first_row = run.first_row + first - run.first
            yield Tile(
                first_row=first_row,
                stop_row=first_row + end - first,
                first_key=first_key,
                stop_key=end,
                mask=torch.zeros(is_hidden.shape).masked_fill_(is_hidden, float("-inf")),
            )


class _CpuAttention(torch.autograd.Function):
    """Both parts and their joint backward, in matrix products: faster than torch's own kernel on a CPU.

    Scores are times log2 e, and exponentials to the base 2: torch's exp takes up to four times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        first_keys: torch.Tensor,
        first_values: torch.Tensor,
        tiles: list[Tile],
        *later: torch.Tensor,
    ) -> torch.Tensor:
        # What is added up is rounded once.
        out, lse = (q.new_empty(shape, dtype=torch.float32) for shape in (q.shape, q.shape[:2]))
        m = first_keys.shape[1]
        for tile in tiles:
            span, values = slice(tile.first_row, tile.stop_row), first_values[tile.first_key : tile.stop_key]
            scores = _tile_scores(q[span], first_keys, tile)
            largest = scores.amax(-1, keepdim=True)
            shares = scores.sub_(largest).exp2_()
            total = shares.sum(-1, keepdim=True)
            found = torch.bmm(shares.to(q.dtype), values.transpose(0, 1)).float().div_(total)
            out[span] = _by_row(found, tile.stop_row - tile.first_row)
            lse[span] = _by_row(total.log2_().add_(largest), tile.stop_row - tile.first_row)[..., 0]
        count = len(later) // 2
        if count:
            later_scores = _later_scores(q, later[:count], _LOG2_E)
            joint = reduce(torch.logaddexp2, later_scores, lse)
            out.mul_((lse - joint).exp2_()[..., None])
            grouped = _grouped(out, m)
            for score, value in zip(later_scores, later[count:], strict=True):
                grouped.addcmul_(_grouped((score - joint).exp2_()[..., None], m), value[:, :, None])
            lse = joint
        out = out.to(q.dtype)
        ctx.save_for_backward(q, first_keys, first_values, out, lse, *later)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, first_keys, first_values, out, lse, *later = ctx.saved_tensors
        scale, m = q.shape[-1] ** -0.5, first_keys.shape[1]
        # Σ over the keys of P dP, which every score's gradient has subtracted.
        mean = (grad_out * out).sum(-1, dtype=torch.float32)
        grad_q = torch.empty_like(q)
        grad_keys, grad_values = (torch.zeros(m, len(first_keys), q.shape[-1], dtype=torch.float32) for _ in range(2))
        for tile in ctx.tiles:
            span, keys = slice(tile.first_row, tile.stop_row), slice(tile.first_key, tile.stop_key)
            grouped_grad = _by_head(grad_out[span], m)
            shares = _tile_scores(q[span], first_keys, tile).sub_(_by_head(lse[span, :, None], m)).exp2_()
            grad_values[:, keys] += torch.bmm(shares.to(q.dtype).transpose(1, 2), grouped_grad)
            change = torch.bmm(grouped_grad, first_values[keys].permute(1, 2, 0)).float()
            slope = change.sub_(_by_head(mean[span, :, None], m)).mul_(shares).to(q.dtype)
            grad_q[span] = _by_row(torch.bmm(slope, first_keys[keys].transpose(0, 1)), tile.stop_row - tile.first_row)
            grad_keys[:, keys] += torch.bmm(slope.transpose(1, 2), _by_head(q[span], m))
        grad_q.mul_(scale)
        grad_keys.mul_(scale)
        count = len(later) // 2
        grad_later_keys, grad_later_values = [], []
        grouped_q, grouped_out, grouped_grad = (_grouped(each, m) for each in (q, grad_out, grad_q))
        later_scores = _later_scores(q, later[:count], _LOG2_E)
        for key, value, score in zip(later[:count], later[count:], later_scores, strict=True):
            share = (score - lse).exp2_()
            change = (grouped_out * value[:, :, None]).sum(-1, dtype=torch.float32).flatten(1)
            slope = _grouped((share * (change - mean) * scale).to(q.dtype)[..., None], m)
            grouped_grad.addcmul_(slope, key[:, :, None])
            grad_later_keys.append((slope * grouped_q).sum(2))
            grad_later_values.append((_grouped(share.to(q.dtype)[..., None], m) * grouped_out).sum(2))
        grad_first = (each.transpose(0, 1).to(q.dtype) for each in (grad_keys, grad_values))
        return grad_q, *grad_first, None, *grad_later_keys, *grad_later_values


def _tile_scores(q: torch.Tensor, first_keys: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Return the masked scores (m, g r, c) float32 of a tile times log2 e, given its ``q`` (r, n, D)."""
    keys = first_keys[tile.first_key : tile.stop_key].permute(1, 2, 0)
    scores = torch.bmm(_by_head(q, len(keys)) * (q.shape[-1] ** -0.5 * _LOG2_E), keys).float()
    by_group = torch.unflatten(scores, 1, (-1, len(q)))
    by_group[..., keys.shape[-1] - tile.mask.shape[1] :] += tile.mask
    return scores


def _by_head(heads: torch.Tensor, m: int) -> torch.Tensor:
    """Turn (r, n, …) into (m, g r, …): the rows of a key head's queries together."""
    return torch.unflatten(heads, 1, (m, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_row(grouped: torch.Tensor, rows: int) -> torch.Tensor:
    """Turn (m, g r, …) back into (r, n, …), given r."""
    return torch.unflatten(grouped, 1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


def _grouped(heads: torch.Tensor, m: int) -> torch.Tensor:
    """View (R, n, …) as (R, m, g, …)."""
    return torch.unflatten(heads, 1, (m, -1))


def _later_scores(q: torch.Tensor, keys: Sequence[torch.Tensor], unit: float = 1.0) -> list[torch.Tensor]:
    """Return the scores (R, n) float32 of ``q`` with each anchor's own key, times ``unit``."""
    scale = q.shape[-1] ** -0.5 * unit
    return [
        (_grouped(q, key.shape[1]) * key[:, :, None]).sum(-1, dtype=torch.float32).flatten(1).mul_(scale)
        for key in keys
    ]


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex_attend(
    q: torch.Tensor,
    first_keys: torch.Tensor,
    first_values: torch.Tensor,
    later_keys: list[torch.Tensor],
    later_values: list[torch.Tensor],
    rows: Rows,
    window: int | None,
) -> torch.Tensor:
    """The same on a GPU: FlexAttention hands the gradient of its log-sum-exp back by itself."""
    # With it come torch's compilers.
    from torch.nn.attention.flex_attention import create_block_mask

    step = len(later_keys)
    documents, flat = rows.documents, rows.flat
    if not len(flat):
        # FlexAttention takes no empty queries; every operand still gets a gradient, of zeros.
        return q + sum(each[:0].sum() for each in (first_keys, first_values, *later_keys, *later_values))

    def is_seen(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        anchor = flat[row]
        seen = (key <= anchor) & (documents[key] == documents[anchor])
        return seen if window is None else seen & (key > anchor + step - window)

    # Made anew for each step of a window; without one all steps could share it, and making it is cheap.
    blocks = create_block_mask(is_seen, None, None, len(flat), len(documents), device=q.device)
    operands = (each.transpose(0, 1)[None] for each in (q, first_keys, first_values))
    out, lse = _compiled_flex()(*operands, block_mask=blocks, enable_gqa=True, return_lse=True)
    return joined(out[0].transpose(0, 1), lse[0].T, q, later_keys, later_values)


def joined(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    later_keys: list[torch.Tensor],
    later_values: list[torch.Tensor],
) -> torch.Tensor:
    """Add each anchor's own later keys to what the block gave: ``out`` (R, n, D), ``lse`` (R, n); differentiable."""
    if not later_keys:
        return out
    m = later_keys[0].shape[1]
    scores = _later_scores(q, later_keys)
    joint = torch.logsumexp(torch.stack((lse, *scores)), dim=0)
    total = _grouped(out * (lse - joint).exp()[..., None].to(q.dtype), m)
    for score, value in zip(scores, later_values, strict=True):
        share = (score - joint).exp().to(q.dtype)
        total = total + _grouped(share[..., None], m) * value[:, :, None]
    return total.flatten(1, 2)
