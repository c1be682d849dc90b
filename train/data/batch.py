"""What one step trains on.

Arrays keep the names they have on disk. A row holds several sequences, one after
the other. What is read from a store is one row without padding; a batch made
otherwise may have several, and what is left of a shorter row is padding.

Shapes: B rows, T tokens of the longest row, D sequences of the row with most, L boundaries, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch

from ...storage.reader import Read
from ...storage.schema import Array
from .corpus import Corpus
from .packing import BatchPlan
from .pinned_buffers import Buffers

PADDING = -1
"""Document number of tokens that belong to none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Packed sequences with their features."""

    input_ids: torch.Tensor
    """(B, T) int64; 0 in padding"""
    loss_mask: torch.Tensor
    """(B, T) bool; False in padding"""
    documents: torch.Tensor
    """(B, T) int64; number of the sequence within the row, PADDING in padding"""
    positions: torch.Tensor
    """(B, T) int64; within the sequence"""
    aux_hidden: torch.Tensor
    """(B, T, L, H) bfloat16, boundaries ascending"""
    argmax: torch.Tensor
    """(B, T) int64; the target's own next token"""
    lse: torch.Tensor
    """(B, T) float32; log-sum-exp of the target's logits over its full vocabulary"""
    last_hidden: torch.Tensor | None = None
    """(B, T, H) bfloat16, after the target's final norm; None where the store has none"""
    topk_ids: torch.Tensor | None = None
    """(B, T, K) int64, by falling logit; None where the last hidden states give all logits"""
    topk_logprob: torch.Tensor | None = None
    """(B, T, K) float16, over the target's full vocabulary; None as ``topk_ids``"""
    anchors: torch.Tensor | None = None
    """(K, B, T) bool; anchors of each drafted position, drawn by the draft family; None until they are"""
    seeds: torch.Tensor | None = None
    """(B, D) int64; of each document, for whatever is random in it, 0 beyond; None where nothing is"""
    window_labels: torch.Tensor | None = None
    """(K,) float32; labels that count in all batches that this process adds to the optimizer step; None
    where this is the only one of all processes"""

    def to(self, device: torch.device) -> Self:
        """Copy every tensor to a device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return type(self)(**{name: tensor.to(device, non_blocking=True) for name, tensor in there.items()})

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int((self.documents != PADDING).sum())


def read_batch(
    corpus: Corpus,
    plan: BatchPlan,
    lengths: Sequence[int],
    *,
    labels_only: bool = False,
    buffers: Buffers | None = None,
    draw_anchors: Callable[[Batch], torch.Tensor] | None = None,
) -> Batch:
    """Read the sequences of ``plan`` into one row, B = 1; none of them is one token of padding.

    ``lengths`` says how many tokens of each sequence to read. ``labels_only`` reads just what decides which labels
    count: the masks and the argmax; hidden states are then of width 0, and the rest is zeros. The hidden states lie
    in ``buffers``, if there are any. ``draw_anchors`` gives the batch its anchors.
    Raises StoreCorruptError where a byte differs from what was committed.
    """
    info = corpus.info
    H, K = (0, 0) if labels_only else (info.hidden_size, info.top_k)
    T = sum(lengths[sequence] for sequence in plan.sequences) or 1
    input_ids, argmax = np.zeros(T, np.int32), np.zeros(T, np.int32)
    loss_mask, lse = np.zeros(T, np.uint8), np.zeros(T, np.float32)
    documents, positions = np.full(T, PADDING, np.int64), np.zeros(T, np.int64)
    # A boundary is read at once: its rows must lie together, or every chunk is copied once more.
    aux_hidden = _empty(buffers, "aux_hidden", (len(corpus.boundaries), T, H))
    plain: dict[str, Array] = {"loss_mask": loss_mask, "argmax": argmax, "input_ids": input_ids, "lse": lse}
    if info.last_hidden:
        plain["last_hidden"] = _empty(buffers, "last_hidden", (T, H))
    else:
        plain["topk_ids"], plain["topk_logprob"] = np.zeros((T, K), np.uint32), np.zeros((T, K), np.float16)
    needed = {name: plain[name] for name in ("loss_mask", "argmax")} if labels_only else plain
    wanted: list[Read] = []
    start = 0
    for document, sequence in enumerate(plan.sequences):
        span = slice(start, start + lengths[sequence])
        if not labels_only:
            wanted += [Read(sequence, "aux_hidden", rows[span], i) for i, rows in enumerate(aux_hidden)]
        wanted += [Read(sequence, name, array[span]) for name, array in needed.items()]
        documents[span] = document
        positions[span] = np.arange(lengths[sequence])
        start = span.stop
    padding: list[Array] = []
    if not plan.sequences:
        padding = [*aux_hidden, *([plain["last_hidden"]] if info.last_hidden else [])]
    corpus.read_all(wanted, padding)
    last_hidden = torch.from_numpy(plain["last_hidden"]).view(torch.bfloat16) if info.last_hidden else None
    batch = Batch(
        input_ids=torch.from_numpy(input_ids).long()[None],
        loss_mask=torch.from_numpy(loss_mask).bool()[None],
        documents=torch.from_numpy(documents)[None],
        positions=torch.from_numpy(positions)[None],
        aux_hidden=torch.from_numpy(aux_hidden).view(torch.bfloat16).transpose(0, 1)[None],
        last_hidden=None if last_hidden is None else last_hidden[None],
        argmax=torch.from_numpy(argmax).long()[None],
        lse=torch.from_numpy(lse)[None],
        topk_ids=None if info.last_hidden else torch.from_numpy(plain["topk_ids"].view(np.int32)).long()[None],
        topk_logprob=None if info.last_hidden else torch.from_numpy(plain["topk_logprob"])[None],
        seeds=torch.tensor([plan.seeds], dtype=torch.int64) if plan.seeds or not plan.sequences else None,
    )
    return batch if draw_anchors is None else replace(batch, anchors=draw_anchors(batch))


def _empty(buffers: Buffers | None, name: str, shape: tuple[int, ...]) -> Array:
    dtype = np.dtype(np.uint16)
    return np.empty(shape, dtype) if buffers is None else buffers.take(name, shape, dtype)
