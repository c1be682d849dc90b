"""Loss and gradients against a slow, obvious reference.

The reference is the definition read aloud, one anchor and one key at a time, in
float64; it shares nothing with the code under test but the weights and the data.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from specx.train.data.batch import Batch
from specx.train.families.eagle3.draft import Draft
from specx.train.families.eagle3.objective import Objective, evaluate, step_weights
from specx.train.families.spec import DraftSpec
from specx.train.loss.divergences import LossName
from specx.train.loss.target_distribution import Vocabulary

from ...conftest import make_spec
from .. import eager

STEPS = 4


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def angles(spec: DraftSpec, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (R/2,) of one position; YaRN from the formula of arXiv 2309.00071."""
    rope = spec.rope_parameters
    dim = int(spec.head_dim * rope.get("partial_rotary_factor", 1.0))
    if rope["rope_type"] == "default":
        plain = torch.tensor([position * rope["rope_theta"] ** (-2 * i / dim) for i in range(dim // 2)]).double()
        return plain.cos(), plain.sin()
    theta, factor, original = rope["rope_theta"], rope["factor"], rope["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = max(dimension(rope["beta_fast"]), 0), min(dimension(rope["beta_slow"]), dim - 1)
    if rope["truncate"]:
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    concentration = 0.1 * math.log(factor) + 1
    by_pair = []
    for i in range(dim // 2):
        frequency = theta ** (-2 * i / dim)
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        by_pair.append(position * (frequency * (1 - ramp) + frequency / factor * ramp))
    angle = torch.tensor(by_pair, dtype=torch.float64)
    return angle.cos() * concentration, angle.sin() * concentration


def rotated(spec: DraftSpec, head: torch.Tensor, position: int) -> torch.Tensor:
    cos, sin = angles(spec, position)
    first, second, rest = head[: len(cos)], head[len(cos) : 2 * len(cos)], head[2 * len(cos) :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest))


def document_states(
    spec: DraftSpec, weights: dict[str, torch.Tensor], embedded: torch.Tensor, aux: torch.Tensor, steps: int
) -> dict[tuple[int, int], torch.Tensor]:
    """Normed hidden states by (step, anchor), of every anchor whose inputs are in the document.

    embedded (T, H), aux (T, L, H), all float64.
    """
    T = len(embedded)
    eps, D = spec.rms_norm_eps, spec.head_dim
    groups = spec.num_attention_heads // spec.num_key_value_heads
    hidden: dict[int, torch.Tensor] = {}
    for t in range(T):
        chunks = [aux[t, i] for i in range(len(spec.boundaries))]
        if spec.fc_norm:
            chunks = [rms_norm(chunk, weights[f"fc_norm.{i}.weight"], eps) for i, chunk in enumerate(chunks)]
        joined = torch.cat(chunks)
        if spec.norm_before_fc:
            joined = rms_norm(joined, weights["input_norm.weight"], eps)
        hidden[t] = weights["fc.weight"] @ joined
    keys: dict[tuple[int, int], torch.Tensor] = {}
    values: dict[tuple[int, int], torch.Tensor] = {}
    states: dict[tuple[int, int], torch.Tensor] = {}
    prefix = "midlayer."
    for k in range(steps):
        following: dict[int, torch.Tensor] = {}
        queries: dict[int, torch.Tensor] = {}
        anchors = range(T - 1 - k)
        for t in anchors:
            e = rms_norm(embedded[t + 1 + k], weights[prefix + "input_layernorm.weight"], eps)
            h = rms_norm(hidden[t], weights[prefix + "hidden_norm.weight"], eps)
            inputs = torch.cat((e, h))
            queries[t] = (weights[prefix + "self_attn.q_proj.weight"] @ inputs).view(-1, D)
            keys[k, t] = (weights[prefix + "self_attn.k_proj.weight"] @ inputs).view(-1, D)
            values[k, t] = (weights[prefix + "self_attn.v_proj.weight"] @ inputs).view(-1, D)
        for t in anchors:
            seen = [(0, j) for j in range(t + 1)] + [(i, t) for i in range(1, k + 1)]
            if spec.sliding_window is not None:
                seen = [(i, j) for i, j in seen if t + k - (i + j) < spec.sliding_window]
            heads = []
            for head in range(spec.num_attention_heads):
                query = rotated(spec, queries[t][head], t + k)
                scores = torch.stack(
                    [query @ rotated(spec, keys[i, j][head // groups], j + i) / math.sqrt(D) for i, j in seen]
                )
                share = scores.exp() / scores.exp().sum()
                heads.append(sum(p * values[key][head // groups] for p, key in zip(share, seen, strict=True)))
            start = hidden[t]
            if spec.norm_before_residual:
                start = rms_norm(start, weights[prefix + "hidden_norm.weight"], eps)
            residual = start + weights[prefix + "self_attn.o_proj.weight"] @ torch.cat(heads)
            x = rms_norm(residual, weights[prefix + "post_attention_layernorm.weight"], eps)
            gate, up = weights[prefix + "mlp.gate_proj.weight"] @ x, weights[prefix + "mlp.up_proj.weight"] @ x
            streamed = residual + weights[prefix + "mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
            states[k, t] = rms_norm(streamed, weights["norm.weight"], eps)
            following[t] = states[k, t] if spec.norm_output else streamed
        hidden = following
    return states


def _alpha(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return sum(torch.minimum(a, b) for a, b in zip(p, q, strict=True))


def _lk_lambda(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    share = math.exp(-3 * _alpha(p, q).item())
    return share * (p * (p / q).log()).sum() + (1 - share) * (1 - _alpha(p, q))


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": lambda p, q: -(p * q.log()).sum(),
    "forward_kl": lambda p, q: (p * (p / q).log()).sum(),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(),
    "total_variation": lambda p, q: 1 - _alpha(p, q),
    "lk_alpha": lambda p, q: -_alpha(p, q).log(),
    "lk_lambda": _lk_lambda,
}


def labelled(
    loss_mask: list[bool], argmax: list[int], vocabulary: list[int], states: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Those (step, anchor) of one document whose loss counts."""
    for k, t in states:
        is_supervised = t + k + 2 < len(loss_mask) and all(loss_mask[t + j] for j in range(1, k + 3))
        if is_supervised and argmax[t + k + 1] in vocabulary:
            yield k, t


def reference(
    draft: Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary, loss: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its gradient by the name of the weight, float64."""
    spec = draft.spec
    weights = {name: p.detach().double().requires_grad_() for name, p in draft.named_parameters()}
    embedded = F.embedding(batch.input_ids, weights.get("embed_tokens.weight", embed_tokens.double()))
    ids = vocabulary.target_ids(torch.arange(spec.draft_vocab_size)).tolist()
    head = vocabulary.target_head.double()
    terms: dict[int, list[torch.Tensor]] = {k: [] for k in range(STEPS)}
    for row in range(len(batch.input_ids)):
        for document in range(int(batch.documents[row].max()) + 1):
            span = batch.documents[row] == document
            states = document_states(spec, weights, embedded[row, span], batch.aux_hidden[row, span].double(), STEPS)
            mask, argmax = batch.loss_mask[row, span].tolist(), batch.argmax[row, span].tolist()
            last = batch.last_hidden[row, span].double()
            for k, t in labelled(mask, argmax, ids, states):
                p, q = (head @ last[t + k + 1]).softmax(-1), (weights["lm_head.weight"] @ states[k, t]).softmax(-1)
                terms[k].append(LOSSES[loss](p, q))
    assert all(terms.values()), "every step must have labels for the comparison to mean anything"
    total = sum(0.8**k * torch.stack(terms[k]).mean() for k in range(STEPS)) / sum(0.8**k for k in range(STEPS))
    total.backward()
    return total.detach(), {name: weight.grad for name, weight in weights.items()}


def distance(draft: Draft, expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a weight's gradient."""
    return max(
        float((parameter.grad.double() - expected[name]).norm() / expected[name].norm())
        for name, parameter in draft.named_parameters()
    )


def require_equal(
    draft: Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary, loss: LossName
) -> None:
    objective = Objective(loss=loss, step_weights=step_weights(STEPS, 0.8))
    found, _ = evaluate(draft, embed_tokens, batch, vocabulary, objective, dtype=torch.float32)
    found.backward()
    expected, gradients = reference(draft, batch, embed_tokens, vocabulary, loss)
    assert abs(found.item() - expected.item()) <= 2e-6 * abs(expected.item())
    assert distance(draft, gradients) <= 2e-6


def test_loss_and_every_gradient_of_a_draft_equal_the_slow_reference(
    draft: Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary
) -> None:
    require_equal(draft, batch, embed_tokens, vocabulary, "cross_entropy")


@pytest.mark.parametrize("spec", [make_spec()], ids=["default"])
@pytest.mark.parametrize("loss", get_args(LossName))
def test_every_loss_and_its_gradient_equal_the_slow_reference(
    draft: Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary, loss: LossName
) -> None:
    require_equal(draft, batch, embed_tokens, vocabulary, loss)


def roomy(spec: DraftSpec, seed: int) -> tuple[Draft, Batch, torch.Tensor, Vocabulary]:
    """The same kind of draft, large enough for rounding errors to even out, with bfloat16 data as a store has it."""
    torch.manual_seed(seed)
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 512, "draft_vocab_size": 256}
    spec = DraftSpec.model_validate(spec.model_dump() | wide)
    draft = Draft(spec)
    for weight in draft.parameters():
        is_norm = weight.ndim == 1
        torch.nn.init.normal_(weight, 1.0 if is_norm else 0.0, 0.2 if is_norm else weight.shape[1] ** -0.5)
    shape = (2, 96)
    batch = Batch(
        input_ids=torch.randint(0, 512, shape),
        loss_mask=torch.rand(shape) < 0.9,
        documents=torch.zeros(shape, dtype=torch.int64),
        positions=torch.arange(96).expand(shape),
        aux_hidden=torch.randn(*shape, len(spec.boundaries), 128).bfloat16(),
        last_hidden=torch.randn(*shape, 128).bfloat16(),
        argmax=torch.randint(0, 256, shape),
        lse=torch.full(shape, 8.0),
    )
    vocabulary = Vocabulary(
        d2t=torch.zeros(256, dtype=torch.int64),
        t2d=torch.arange(512) < 256,
        target_head=torch.randn(256, 128).bfloat16() / 10,
    )
    return draft, batch, torch.randn(512, 128).bfloat16(), vocabulary


def gradient_of(draft: Draft, loss: torch.Tensor) -> torch.Tensor:
    """Of all weights, in one row, float64."""
    return torch.cat([each.double().flatten() for each in torch.autograd.grad(loss, list(draft.parameters()))])


def test_in_bfloat16_the_gradient_is_no_farther_from_float32_than_the_eager_one(spec: DraftSpec) -> None:
    weights = step_weights(STEPS, 0.8)
    ours, theirs = 0.0, 0.0
    for seed in range(4):
        draft, batch, embed_tokens, vocabulary = roomy(spec, seed)
        exact = gradient_of(draft, eager.loss(draft, embed_tokens, batch, vocabulary.float(), weights))
        vocabulary.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            naive = gradient_of(draft, eager.loss(draft, embed_tokens, batch, vocabulary, weights))
        objective = Objective(loss="cross_entropy", step_weights=weights)
        loss, _ = evaluate(draft, embed_tokens, batch, vocabulary, objective, dtype=torch.bfloat16)
        ours += float((gradient_of(draft, loss) - exact).norm() / exact.norm())
        theirs += float((naive - exact).norm() / exact.norm())
    assert ours <= theirs, f"{ours / 4:.5f} against {theirs / 4:.5f}"
