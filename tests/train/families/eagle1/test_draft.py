"""EAGLE-1 against a slow reference, its chain, and its memory."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from specx.train.data.batch import Batch
from specx.train.data.feature_noise import with_uniform_noise
from specx.train.families.autoregressive import AutoregressiveProposer
from specx.train.families.eagle1.draft import Eagle1Draft
from specx.train.families.eagle1.objective import feature_loss
from specx.train.families.eagle1.spec import Eagle1Spec
from specx.train.families.load import ExportedDraft
from specx.train.loss.anchors import supervised_anchors
from specx.train.loss.metrics import StepCounts
from specx.train.loss.target_distribution import Vocabulary

from ...conftest import anchored, make_eagle1_spec
from ..eagle3.test_gradients import rms_norm, rotated


@pytest.fixture
def spec() -> Eagle1Spec:
    return make_eagle1_spec()


@pytest.fixture
def draft(spec: Eagle1Spec) -> Eagle1Draft:
    torch.manual_seed(1)
    draft = Eagle1Draft(spec)
    for weight in draft.parameters():
        is_norm = weight.ndim == 1
        torch.nn.init.normal_(weight, 1.0 if is_norm else 0.0, 0.2 if is_norm else weight.shape[1] ** -0.5)
    return draft


@pytest.fixture
def vocabulary(spec: Eagle1Spec) -> Vocabulary:
    V = spec.vocab_size
    torch.manual_seed(3)
    return Vocabulary(
        d2t=torch.zeros(V, dtype=torch.int64),
        t2d=torch.ones(V, dtype=torch.bool),
        target_head=torch.randn(V, spec.hidden_size),
    )


def evaluated(
    draft: Eagle1Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary, **options: Any
) -> StepCounts:
    embedded, last = draft.embed(batch.input_ids, embed_tokens), batch.last_hidden.float()
    given = {"inputs": last, "logit_loss_weight": 0.1} | options
    (counts,) = feature_loss(draft, embedded, batch=anchored(batch, 1), vocabulary=vocabulary, **given)
    return counts


def reference(
    spec: Eagle1Spec, weights: dict[str, torch.Tensor], embedded: torch.Tensor, last: torch.Tensor
) -> list[torch.Tensor]:
    """The predicted feature of every token but the last of one document; embedded and last (T, H), float64."""
    prefix, D = "layers.0.", spec.head_dim
    groups = spec.num_attention_heads // spec.num_key_value_heads
    joined = [weights["fc.weight"] @ torch.cat((embedded[t + 1], last[t])) for t in range(len(last) - 1)]
    q, k, v = (
        [(weights[f"{prefix}self_attn.{name}_proj.weight"] @ x).view(-1, D) for x in joined] for name in ("q", "k", "v")
    )
    predicted = []
    for t, x in enumerate(joined):
        heads = []
        for head in range(spec.num_attention_heads):
            query = rotated(spec, q[t][head], t)
            scores = torch.stack([query @ rotated(spec, k[j][head // groups], j) / D**0.5 for j in range(t + 1)])
            share = scores.exp() / scores.exp().sum()
            heads.append(sum(p * v[j][head // groups] for j, p in enumerate(share)))
        residual = x + weights[prefix + "self_attn.o_proj.weight"] @ torch.cat(heads)
        normed = rms_norm(residual, weights[prefix + "post_attention_layernorm.weight"], spec.rms_norm_eps)
        gate, up = (weights[f"{prefix}mlp.{name}_proj.weight"] @ normed for name in ("gate", "up"))
        predicted.append(residual + weights[prefix + "mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up))
    return predicted


def test_loss_and_every_gradient_equal_the_slow_reference(
    spec: Eagle1Spec, draft: Eagle1Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary
) -> None:
    counts = evaluated(draft, batch, embed_tokens, vocabulary)
    counts.loss.backward()

    weights = {name: p.detach().double().requires_grad_() for name, p in draft.named_parameters()}
    head = vocabulary.target_head.double()
    terms = []
    for row in range(len(batch.input_ids)):
        for document in range(int(batch.documents[row].max()) + 1):
            span = batch.documents[row] == document
            last, mask = batch.last_hidden[row, span].double(), batch.loss_mask[row, span].tolist()
            embedded = F.embedding(batch.input_ids[row, span], embed_tokens).double()
            for t, found in enumerate(reference(spec, weights, embedded, last)):
                if t + 2 >= len(mask) or not (mask[t + 1] and mask[t + 2]):
                    continue
                error = (found - last[t + 1]).abs()
                smooth = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
                p, log_q = (head @ last[t + 1]).softmax(0), (head @ found).log_softmax(0)
                terms.append(smooth - 0.1 * (p * log_q).sum())
    expected = torch.stack(terms).sum()
    expected.backward()
    assert len(terms) == int(counts.labels) > 10
    assert abs(counts.loss.item() - expected.item()) <= 1e-5 * abs(expected.item())
    for name, parameter in draft.named_parameters():
        gradient = weights[name].grad
        error = (parameter.grad.double() - gradient).norm() / gradient.norm()
        assert error <= 1e-5, f"{name}: {error}"


def test_the_first_drafted_feature_of_the_chain_is_the_one_trained(
    draft: Eagle1Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary
) -> None:
    last = batch.last_hidden.float()
    predicted = draft(draft.embed(batch.input_ids, embed_tokens), last, batch)
    exported = ExportedDraft(draft=draft, vocabulary=torch.arange(50))
    decoder = AutoregressiveProposer(exported.draft, exported.vocabulary, embed_tokens, vocabulary.target_head)
    ids = batch.input_ids[1].tolist()
    for t in range(len(ids) - 1):
        decoder.extend([ids[t + 1]], last[1, t : t + 1])
        first = next(decoder.ahead([], 1))
        assert (first - predicted[1, t]).norm() <= 1e-5 * first.norm()


def test_chunks_of_rows_change_nothing(
    draft: Eagle1Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary
) -> None:
    whole = evaluated(draft, batch, embed_tokens, vocabulary)
    chunked = evaluated(draft, batch, embed_tokens, vocabulary, logits_at_once=3 * len(vocabulary.target_head))
    for name in StepCounts.__slots__:
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name))


def test_noise_is_on_the_inputs_and_not_on_the_labels(
    draft: Eagle1Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary
) -> None:
    last = batch.last_hidden.float()
    noisy = with_uniform_noise(last, batch, 0.1)
    found = evaluated(draft, batch, embed_tokens, vocabulary, inputs=noisy)
    predicted = draft(draft.embed(batch.input_ids, embed_tokens), noisy, batch)
    rows, t = torch.nonzero(supervised_anchors(batch, 1)[0], as_tuple=True)
    ours, theirs = predicted[rows, t], last[rows, t + 1]
    p = F.linear(theirs, vocabulary.target_head).softmax(-1)
    log_q = F.linear(ours, vocabulary.target_head).log_softmax(-1)
    expected = F.smooth_l1_loss(ours, theirs, reduction="none").mean(-1).sum() - 0.1 * (p * log_q).sum()
    torch.testing.assert_close(found.loss, expected)
