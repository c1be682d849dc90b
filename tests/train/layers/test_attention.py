"""Attention in tiles against the dense one, on rows that are longer than a tile and full of holes."""

from dataclasses import replace

import pytest
import torch

from specx.train.data.batch import PADDING, Batch
from specx.train.layers.attention import attend, joined
from specx.train.layers.computed_rows import Rows, computed_rows

from ..conftest import make_spec
from ..families.eager import attend as attend_densely

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8

pytestmark = pytest.mark.parametrize("spec", [make_spec()], ids=["default"])


@pytest.fixture
def long_batch(batch: Batch) -> Batch:
    """Rows of 400 tokens: documents of 150 and 170 and padding, and one of 400; supervised in stretches."""
    B, T = 2, 400
    documents = torch.full((B, T), PADDING)
    documents[0, :150], documents[0, 150:320], documents[1] = 0, 1, 0
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 40:], mask[1, 5:9], mask[1, 100:370] = True, True, True
    return replace(batch, documents=documents, loss_mask=mask & (documents != PADDING))


def rows_of(batch: Batch) -> Rows:
    return computed_rows(batch, batch.loss_mask)


def test_every_anchor_asked_for_is_computed_and_runs_stay_in_their_documents(long_batch: Batch) -> None:
    rows = rows_of(long_batch)
    wanted = long_batch.loss_mask.flatten().nonzero().flatten()
    assert torch.isin(wanted, rows.flat).all()
    assert torch.equal(rows.of[rows.flat], torch.arange(len(rows.flat)))
    document = rows.documents
    for run in rows.runs:
        count = run.stop_row - run.first_row
        assert torch.equal(rows.flat[run.first_row : run.stop_row], torch.arange(run.first, run.first + count))
        assert len(document[run.document : run.first + count].unique()) == 1
        assert run.document % 400 == 0 or document[run.document - 1] != document[run.document]


@pytest.mark.parametrize("last", [370, 371, 399])
def test_rows_are_a_multiple_of_64_by_anchors_in_front_of_the_wanted(long_batch: Batch, last: int) -> None:
    long_batch.loss_mask[1, 100:last] = True
    rows = rows_of(long_batch)
    assert len(rows.flat) % 64 == 0
    assert len(rows.flat.unique()) == len(rows.flat)
    assert len(rows.flat) - int(long_batch.loss_mask.sum()) < 64 + 32


def test_rows_are_the_wanted_ones_where_nothing_is_in_front_of_them(long_batch: Batch) -> None:
    long_batch.loss_mask[:] = long_batch.documents != PADDING
    assert torch.equal(rows_of(long_batch).flat, long_batch.loss_mask.flatten().nonzero().flatten())


def test_a_batch_without_anchors_has_no_rows(long_batch: Batch) -> None:
    rows = computed_rows(long_batch, torch.zeros_like(long_batch.loss_mask))
    assert (len(rows.flat), rows.runs) == (0, [])


@pytest.mark.parametrize("window", [None, 7, 60, 390])
@pytest.mark.parametrize("later", [0, 1, 4])
def test_tiles_and_later_keys_give_what_dense_attention_gives_and_its_gradients(
    long_batch: Batch, window: int | None, later: int
) -> None:
    rows, N = rows_of(long_batch), long_batch.documents.numel()
    torch.manual_seed(0)
    q = torch.randn(len(rows.flat), HEADS, HEAD_DIM, requires_grad=True)
    first = [torch.randn(N, KV_HEADS, HEAD_DIM, requires_grad=True) for _ in range(2)]
    keys, values = (
        [torch.randn(len(rows.flat), KV_HEADS, HEAD_DIM, requires_grad=True) for _ in range(later)] for _ in range(2)
    )
    inputs = [q, *first, *keys, *values]
    found = attend(q, *first, keys, values, rows, window)

    def dense(rowwise: torch.Tensor, groups: int) -> torch.Tensor:
        """(B, n, T, D), of the computed anchors or of all tokens."""
        whole = rowwise
        if len(rowwise) != N:
            whole = torch.zeros(N, *rowwise.shape[1:]).index_copy(0, rows.flat, rowwise)
        return whole.view(2, -1, *rowwise.shape[1:]).transpose(1, 2).repeat_interleave(groups, dim=1)

    documents = long_batch.documents
    is_visible = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    if window is not None:
        is_visible = is_visible.triu(later - window + 1)
    groups = HEADS // KV_HEADS
    expected = attend_densely(
        dense(q, 1),
        *(dense(each, groups) for each in first),
        is_visible,
        [dense(each, groups) for each in keys],
        [dense(each, groups) for each in values],
    )
    expected = expected.transpose(1, 2).flatten(0, 1)[rows.flat]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(found)
    for ours, reference in zip(
        torch.autograd.grad(found, inputs, slope), torch.autograd.grad(expected, inputs, slope), strict=True
    ):
        assert float((ours - reference).norm() / reference.norm()) <= 2e-6


def test_later_keys_joined_by_autograd_give_the_same_as_in_closed_form(long_batch: Batch) -> None:
    rows, N = rows_of(long_batch), long_batch.documents.numel()
    torch.manual_seed(0)
    q = torch.randn(len(rows.flat), HEADS, HEAD_DIM)
    first = [torch.randn(N, KV_HEADS, HEAD_DIM) for _ in range(2)]
    keys, values = ([torch.randn(len(rows.flat), KV_HEADS, HEAD_DIM) for _ in range(3)] for _ in range(2))
    groups = HEADS // KV_HEADS
    scores = torch.einsum("rnd,snd->rns", q, first[0].repeat_interleave(groups, 1)) * HEAD_DIM**-0.5
    anchor = rows.flat[:, None]
    is_visible = (torch.arange(N) <= anchor) & (rows.documents == rows.documents[anchor])
    scores = scores.masked_fill(~is_visible[:, None], float("-inf"))
    block = torch.einsum("rns,snd->rnd", scores.softmax(-1), first[1].repeat_interleave(groups, 1))
    found = joined(block, scores.logsumexp(-1), q, keys, values)
    torch.testing.assert_close(found, attend(q, *first, keys, values, rows, None), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 60])
def test_a_gpu_attends_as_the_cpu_does(long_batch: Batch, window: int | None) -> None:
    rows, N = rows_of(long_batch), long_batch.documents.numel()
    on_gpu = rows_of(long_batch.to(torch.device("cuda")))
    torch.manual_seed(0)
    q = torch.randn(len(rows.flat), HEADS, 64)
    first = [torch.randn(N, KV_HEADS, 64) for _ in range(2)]
    later = [torch.randn(len(rows.flat), KV_HEADS, 64) for _ in range(2)]
    expected = attend(q, *first, [later[0]], [later[1]], rows, window)
    moved = [each.cuda() for each in (q, *first, *later)]
    found = attend(*moved[:3], [moved[3]], [moved[4]], on_gpu, window)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
