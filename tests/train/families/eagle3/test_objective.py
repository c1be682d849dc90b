"""Which anchors count, and the metrics, by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from specx.train.data.batch import Batch
from specx.train.families.eagle3.draft import Draft
from specx.train.families.eagle3.objective import (
    Objective,
    StepCounts,
    evaluate,
    metrics,
    step_counts,
    step_weights,
    supervised_anchors,
)
from specx.train.families.spec import DraftSpec
from specx.train.layers.computed_rows import computed_rows
from specx.train.loss.chunked_loss import Comparison, joint_loss
from specx.train.loss.divergences import LossName
from specx.train.loss.target_distribution import Vocabulary

STEPS = 4


def test_anchors_need_every_token_up_to_the_label_supervised_and_in_their_document(batch: Batch) -> None:
    for k, anchors in enumerate(supervised_anchors(batch, STEPS)):
        for row in range(anchors.shape[0]):
            for t in range(anchors.shape[1]):
                ahead = range(t + 1, t + k + 3)
                expected = (
                    ahead.stop <= anchors.shape[1]
                    and batch.documents[row, t] >= 0
                    and all(
                        batch.loss_mask[row, j] and batch.documents[row, j] == batch.documents[row, t] for j in ahead
                    )
                )
                assert bool(anchors[row, t]) == bool(expected), (k, row, t)


def test_step_weights_sum_to_one_and_decay() -> None:
    weights = step_weights(3, 0.8)
    assert sum(weights) == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(0.8)


def measured(
    lm_head: torch.nn.Linear,
    outputs: list[torch.Tensor],
    batch: Batch,
    vocabulary: Vocabulary,
    loss: LossName = "cross_entropy",
) -> tuple[torch.Tensor, list[StepCounts]]:
    """The summed losses of all steps and the counts, of normed hidden states (B, T, H)."""
    anchors = supervised_anchors(batch, len(outputs))
    rows = computed_rows(batch, anchors[0])
    comparison = Comparison(
        batch=batch,
        rows=rows,
        anchors=torch.stack([each.flatten() for each in anchors]),
        weights=torch.ones(len(outputs)),
        vocabulary=vocabulary,
        loss=loss,
        dtype=torch.float32,
        with_metrics=True,
    )
    total, results = joint_loss([each.flatten(0, 1)[rows.flat] for each in outputs], lm_head.weight, comparison)
    return total, step_counts(comparison, results)


def one_hot_case() -> tuple[torch.nn.Linear, list[torch.Tensor], Batch, Vocabulary]:
    """A document of 6 tokens whose drafted tokens are set by hand; draft id i is target id i of 4, target has 6."""
    T, H = 6, 4
    lm_head = torch.nn.Linear(H, 4, bias=False)
    with torch.no_grad():
        lm_head.weight.copy_(torch.eye(4) * 10)
    vocabulary = Vocabulary(
        d2t=torch.zeros(4, dtype=torch.int64),
        t2d=torch.tensor([True] * 4 + [False] * 2),
        target_head=torch.eye(4),
    )
    ids = torch.tensor([[0, 1, 2, 3, 1, 2]])
    batch = Batch(
        input_ids=ids,
        loss_mask=torch.ones(1, T, dtype=torch.bool),
        documents=torch.zeros(1, T, dtype=torch.int64),
        positions=torch.arange(T)[None],
        aux_hidden=torch.zeros(1, T, 1, H),
        last_hidden=torch.zeros(1, T, H),
        # The target's best behind tokens 1 to 4: 2, 5 (outside the draft vocabulary), 1, 2.
        argmax=torch.tensor([[1, 2, 5, 1, 2, 0]]),
        lse=torch.full((1, T), 2.0),
    )
    # Step 0 at anchors 0..3 drafts 2, 3, 1, 2; step 1 at anchors 0..2 drafts 0, 1, 2.
    step_0 = F.one_hot(torch.tensor([2, 3, 1, 2, 0, 0]), H).float()[None]
    step_1 = F.one_hot(torch.tensor([0, 1, 2, 0, 0, 0]), H).float()[None]
    return lm_head, [step_0, step_1], batch, vocabulary


def test_a_target_outside_the_draft_vocabulary_is_a_miss_and_not_skipped() -> None:
    values = metrics(measured(*one_hot_case())[1])
    # Anchors 0, 2 and 3 hit; anchor 1, whose target is outside, is a miss.
    assert values["accuracy_0"] == pytest.approx(3 / 4)
    assert values["vocabulary_coverage"] == pytest.approx(3 / 4)


def test_acceptance_length_counts_joint_prefixes_not_products() -> None:
    values = metrics(measured(*one_hot_case())[1])
    # Step 1 hits at anchor 1 (best is 1) and 2 (best is 2); only anchor 2 also hit at step 0.
    assert values["accuracy_1"] == pytest.approx(2 / 3)
    assert values["acceptance_length"] == pytest.approx(1 + 3 / 4 + 1 / 3)


def test_text_accuracy_compares_with_the_stored_text() -> None:
    values = metrics(measured(*one_hot_case())[1])
    # The text at tokens 2..5 is 2, 3, 1, 2: step 0 drafts just that.
    assert values["text_accuracy_0"] == pytest.approx(1.0)


def test_overlap_uses_the_target_distribution_over_its_full_vocabulary() -> None:
    lm_head, outputs, batch, vocabulary = one_hot_case()
    values = metrics(measured(lm_head, outputs, batch, vocabulary)[1])
    # Target logits are 0 on the draft vocabulary with a log-sum-exp of 2: p = e^-2 on each of 4 tokens.
    q = torch.tensor([10.0, 0, 0, 0]).softmax(-1)
    p = torch.full((4,), -2.0).exp()
    assert values["overlap_0"] == pytest.approx(float(torch.minimum(p, q).sum()), rel=1e-5)


@pytest.fixture
def whole_head(spec: DraftSpec, vocabulary: Vocabulary) -> torch.Tensor:
    """(V, H), of which the vocabulary has the rows of its tokens."""
    head = torch.randn(spec.vocab_size, spec.hidden_size, generator=torch.Generator().manual_seed(9)) / 4
    head[vocabulary.t2d] = vocabulary.target_head
    return head


def with_top_k(batch: Batch, head: torch.Tensor, K: int) -> tuple[Batch, Batch]:  # noqa: N803
    """The batch with what the target's head makes of its last hidden states, exactly and as a store without them."""
    assert batch.last_hidden is not None
    logprob = F.linear(batch.last_hidden.float(), head)
    lse = logprob.logsumexp(-1)
    values, ids = (logprob - lse[..., None]).topk(K)
    exact = replace(batch, lse=lse, argmax=ids[..., 0])
    return exact, replace(exact, last_hidden=None, topk_ids=ids, topk_logprob=values)


def gradient(draft: Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Of every weight, in one row."""
    objective = Objective(loss="cross_entropy", step_weights=step_weights(3, 0.8))
    loss, _ = evaluate(draft, embed_tokens, batch, vocabulary, objective, dtype=torch.float32)
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(draft.parameters()))])


def test_with_the_whole_vocabulary_as_top_k_the_gradient_is_exact(
    spec: DraftSpec,
    draft: Draft,
    batch: Batch,
    embed_tokens: torch.Tensor,
    vocabulary: Vocabulary,
    whole_head: torch.Tensor,
) -> None:
    exact, top_k = with_top_k(batch, whole_head, spec.vocab_size)
    expected, found = (gradient(draft, each, embed_tokens, vocabulary) for each in (exact, top_k))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    objective = Objective(loss="cross_entropy", step_weights=step_weights(3, 0.8))
    overlaps = []
    for each in (exact, top_k):
        _, counts = evaluate(draft, embed_tokens, each, vocabulary, objective, dtype=torch.float32)
        overlaps.append(metrics(counts)["overlap_0"])
    assert overlaps[0] == pytest.approx(overlaps[1], rel=1e-4)


def test_the_more_logits_are_kept_the_nearer_the_gradient(
    draft: Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary, whole_head: torch.Tensor
) -> None:
    errors = []
    for K in (2, 10, 40):
        exact, top_k = with_top_k(batch, whole_head, K)
        expected, found = (gradient(draft, each, embed_tokens, vocabulary) for each in (exact, top_k))
        assert torch.isfinite(found).all()
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[0] > errors[1] > errors[2]


def test_the_tail_is_one_bucket() -> None:
    lm_head, outputs, batch, vocabulary = one_hot_case()
    # Known are tokens 0 and 5, of which the draft has only 0; half of the mass is beyond them.
    ids = torch.tensor([0, 5]).expand(1, 6, 2)
    logprob = torch.tensor([0.3, 0.2]).log().expand(1, 6, 2)
    known = replace(batch, last_hidden=None, topk_ids=ids, topk_logprob=logprob)
    _, (step,) = measured(lm_head, outputs[:1], known, vocabulary)
    total = 0.0
    for anchor in (0, 2, 3):
        q = lm_head(outputs[0][0, anchor]).softmax(-1)
        total += -(0.3 * q[0].log() + 0.5 * q[1:].sum().log()).item() / 0.8
    assert step.loss.item() == pytest.approx(total, rel=1e-5)


def test_a_draft_vocabulary_within_the_top_k_leaves_no_bucket() -> None:
    lm_head, outputs, batch, vocabulary = one_hot_case()
    ids = torch.arange(4).expand(1, 6, 4)
    logprob = torch.tensor([0.1, 0.2, 0.3, 0.2]).log().expand(1, 6, 4)
    known = replace(batch, last_hidden=None, topk_ids=ids, topk_logprob=logprob)
    loss, _ = measured(lm_head, outputs[:1], known, vocabulary)
    (weight,) = torch.autograd.grad(loss, [lm_head.weight])
    assert torch.isfinite(loss)
    assert torch.isfinite(weight).all()
