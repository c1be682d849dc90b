"""The unrolled step against the draft as an engine runs it."""

import pytest
import torch

from specx.train.data.batch import PADDING, Batch
from specx.train.families.autoregressive import AutoregressiveProposer
from specx.train.families.eagle3.draft import Eagle3Draft
from specx.train.families.eagle3.unroll import unroll as fast_unroll
from specx.train.layers.computed_rows import computed_rows

STEPS = 4


def unroll(draft: Eagle3Draft, batch: Batch, embed_tokens: torch.Tensor, steps: int = STEPS) -> list[torch.Tensor]:
    """Normed hidden states (B, T, H) of all anchors but padding, where they are 0."""
    rows = computed_rows(batch, batch.documents != PADDING)
    outputs = fast_unroll(draft, embed_tokens, batch, rows, steps, torch.float32)
    everywhere = [output.new_zeros(batch.input_ids.numel(), output.shape[1]) for output in outputs]
    return [
        whole.index_copy(0, rows.flat, output).view(*batch.input_ids.shape, -1)
        for whole, output in zip(everywhere, outputs, strict=True)
    ]


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Those that a batch has."""
    return {name: getattr(batch, name) for name in Batch.__slots__ if getattr(batch, name) is not None}


def test_each_unrolled_step_equals_a_kv_cached_autoregressive_draft(
    draft: Eagle3Draft, batch: Batch, embed_tokens: torch.Tensor
) -> None:
    outputs = unroll(draft, batch, embed_tokens)
    vocabulary = torch.arange(draft.spec.draft_vocab_size)
    compared = 0
    for row in range(len(batch.input_ids)):
        for document in range(int(batch.documents[row].max()) + 1):
            span = (batch.documents[row] == document).nonzero().flatten()
            ids, aux = batch.input_ids[row, span].tolist(), batch.aux_hidden[row, span].float()
            decoder = AutoregressiveProposer(draft, vocabulary, embed_tokens, embed_tokens)
            for t in range(len(ids) - 1 - STEPS):
                decoder.extend([ids[t + 1]], aux[t : t + 1])
                for step, expected in enumerate(decoder.ahead(ids[t + 2 :], STEPS)):
                    found = outputs[step][row, span[0] + t]
                    error = (found - expected).norm() / expected.norm()
                    assert error <= 1e-5, f"document {document} of row {row}, anchor {t}, step {step}: {error}"
                    compared += 1
    assert compared == STEPS * ((13 - 5) + (7 - 5) + (22 - 5))


def test_a_document_is_not_moved_by_what_shares_its_row(
    draft: Eagle3Draft, batch: Batch, embed_tokens: torch.Tensor
) -> None:
    together = unroll(draft, batch, embed_tokens)
    span = batch.documents[0] == 1
    of_tokens = {name: tensor for name, tensor in tensors(batch).items() if name != "seeds"}
    alone = Batch(**{name: tensor[:1, span] for name, tensor in of_tokens.items()})
    for step, (packed, single) in enumerate(zip(together, unroll(draft, alone, embed_tokens), strict=True)):
        # Later anchors read tokens behind the document's end; they carry no loss.
        valid = int(span.sum()) - 1 - step
        torch.testing.assert_close(packed[:1, span][:, :valid], single[:, :valid], rtol=1e-5, atol=1e-5)


def test_padding_gives_finite_values(draft: Eagle3Draft, batch: Batch, embed_tokens: torch.Tensor) -> None:
    assert (batch.documents == PADDING).any()
    assert all(output.isfinite().all() for output in unroll(draft, batch, embed_tokens))


def test_rows_shorter_than_the_unroll_are_allowed(draft: Eagle3Draft, batch: Batch, embed_tokens: torch.Tensor) -> None:
    short = Batch(**{name: tensor[:, :3] for name, tensor in tensors(batch).items()})
    assert [output.shape[1] for output in unroll(draft, short, embed_tokens, steps=6)] == [3] * 6


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_computes(draft: Eagle3Draft, batch: Batch, embed_tokens: torch.Tensor) -> None:
    expected = unroll(draft, batch, embed_tokens)
    device = torch.device("cuda")
    found = unroll(draft.to(device), batch.to(device), embed_tokens.to(device))
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), reference, rtol=1e-4, atol=1e-4)
