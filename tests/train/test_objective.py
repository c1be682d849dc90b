"""Which anchors count, and the metrics, by hand."""

import pytest
import torch
from torch.nn import functional as F

from specx.train.batch import Batch
from specx.train.objective import (
    Vocabulary,
    evaluate_steps,
    metrics,
    step_weights,
    supervised_anchors,
)

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
    values = metrics(evaluate_steps(*one_hot_case()))
    # Anchors 0, 2 and 3 hit; anchor 1, whose target is outside, is a miss.
    assert values["accuracy_0"] == pytest.approx(3 / 4)
    assert values["vocabulary_coverage"] == pytest.approx(3 / 4)


def test_acceptance_length_counts_joint_prefixes_not_products() -> None:
    values = metrics(evaluate_steps(*one_hot_case()))
    # Step 1 hits at anchor 1 (best is 1) and 2 (best is 2); only anchor 2 also hit at step 0.
    assert values["accuracy_1"] == pytest.approx(2 / 3)
    assert values["acceptance_length"] == pytest.approx(1 + 3 / 4 + 1 / 3)


def test_text_accuracy_compares_with_the_stored_text() -> None:
    values = metrics(evaluate_steps(*one_hot_case()))
    # The text at tokens 2..5 is 2, 3, 1, 2: step 0 drafts just that.
    assert values["text_accuracy_0"] == pytest.approx(1.0)


def test_overlap_uses_the_target_distribution_over_its_full_vocabulary() -> None:
    lm_head, outputs, batch, vocabulary = one_hot_case()
    values = metrics(evaluate_steps(lm_head, outputs, batch, vocabulary))
    # Target logits are 0 on the draft vocabulary with a log-sum-exp of 2: p = e^-2 on each of 4 tokens.
    q = torch.tensor([10.0, 0, 0, 0]).softmax(-1)
    p = torch.full((4,), -2.0).exp()
    assert values["overlap_0"] == pytest.approx(float(torch.minimum(p, q).sum()), rel=1e-5)
