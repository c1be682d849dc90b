"""Which anchors of a batch are computed, and which keys each of them sees.

An anchor without a label reaches the loss only through its keys and values of step
0. So queries, the MLP and the head are computed for the others alone, in runs:
anchors of one document, one behind the other.

Shapes: N = B * T tokens of the flattened batch, R computed anchors.
"""

from dataclasses import dataclass

import torch

from ..data.batch import PADDING, Batch

_CLOSED_GAP = 32
"""Unsupervised anchors between two runs that are computed too: less work than another call of the kernel."""

_MULTIPLE = 64
"""Of which rows are a multiple, if there are anchors enough in front of runs: oneDNN compiles code for each number of
rows that it meets, which for small matrices takes longer than some rows more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Anchors of one document, by their number among the computed and in the batch."""

    first_row: int
    stop_row: int
    first: int
    """Flat position of the first anchor; the run has as many as rows."""
    document: int
    """Flat position of the document's first token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The computed anchors of a batch, ascending."""

    flat: torch.Tensor
    """(R,) int64, position in the flattened batch"""
    of: torch.Tensor
    """(N,) int64, the row of a position, R where it is not computed"""
    runs: list[Run]
    documents: torch.Tensor
    """(N,) int64, another number for each document; PADDING in padding"""


def computed_rows(batch: Batch, anchors: torch.Tensor) -> Rows:
    """Choose the rows that ``anchors`` (B, T) bool need."""
    T = batch.documents.shape[1]
    document = batch.documents.flatten()
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[1:] = document[1:] != document[:-1]
    starts[::T] = True
    number = starts.cumsum(0) - 1
    first_of = starts.nonzero().flatten()
    wanted = anchors.flatten().nonzero().flatten()
    # A few numbers a run: the rest stays on the device.
    is_next = torch.ones_like(wanted, dtype=torch.bool)
    is_next[1:] = (wanted[1:] - wanted[:-1] > _CLOSED_GAP) | (number[wanted[1:]] != number[wanted[:-1]])
    begins = is_next.nonzero().flatten()
    ends = torch.cat((begins[1:], begins.new_tensor([len(wanted)])[: len(begins)])) - 1
    described = torch.stack((wanted[begins], wanted[ends], first_of[number[wanted[begins]]]), dim=1).tolist()
    runs: list[Run] = []
    row = free = 0
    lacking = -sum(last - first + 1 for first, last, _ in described) % _MULTIPLE
    for wanted_first, last, document_start in described:
        first = wanted_first - min(lacking, wanted_first - max(document_start, free))
        lacking -= wanted_first - first
        runs.append(Run(first_row=row, stop_row=row + last - first + 1, first=first, document=document_start))
        row, free = runs[-1].stop_row, last + 1
    flat = (
        torch.cat([torch.arange(run.first, run.first + run.stop_row - run.first_row) for run in runs])
        if runs
        else torch.zeros(0, dtype=torch.int64)
    ).to(document.device)
    of = torch.full_like(document, row)
    of[flat] = torch.arange(row, device=document.device)
    return Rows(flat=flat, of=of, runs=runs, documents=number.masked_fill(document == PADDING, PADDING))
