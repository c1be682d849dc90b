"""Loss and gradients against a slow, obvious reference.

The reference is the definition read aloud, one anchor and one key at a time, in
float64; it shares nothing with the code under test but the weights and the data.
"""

import math

import torch

from specx.train.batch import Batch
from specx.train.draft import Draft
from specx.train.labels import Vocabulary
from specx.train.objective import Objective, evaluate, step_weights
from specx.train.spec import DraftSpec

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


def loss_terms(
    states: dict[tuple[int, int], torch.Tensor],
    weights: dict[str, torch.Tensor],
    loss_mask: list[bool],
    argmax: list[int],
    last: torch.Tensor,
    target_head: torch.Tensor,
    vocabulary: list[int],
    steps: int,
) -> dict[int, list[torch.Tensor]]:
    """Cross-entropies of one document by step; last (T, H), target_head (Vd, H), float64."""
    terms: dict[int, list[torch.Tensor]] = {k: [] for k in range(steps)}
    for (k, t), state in states.items():
        if t + k + 2 >= len(loss_mask) or not all(loss_mask[t + j] for j in range(1, k + 3)):
            continue
        if argmax[t + k + 1] not in vocabulary:
            continue
        z = target_head @ last[t + k + 1]
        p = z.exp() / z.exp().sum()
        logits = weights["lm_head.weight"] @ state
        log_q = logits - logits.exp().sum().log()
        terms[k].append(-(p * log_q).sum())
    return terms


def test_loss_and_every_gradient_equal_the_slow_reference(
    spec: DraftSpec, draft: Draft, batch: Batch, embed_tokens: torch.Tensor, vocabulary: Vocabulary
) -> None:
    objective = Objective(loss="cross_entropy", step_weights=step_weights(STEPS, 0.8))
    loss, _ = evaluate(draft, embed_tokens, batch, vocabulary, objective, dtype=torch.float32)
    loss.backward()

    embedded = draft.embed(batch.input_ids, embed_tokens)
    weights = {name: p.detach().double().requires_grad_() for name, p in draft.named_parameters()}
    ids = vocabulary.target_ids(torch.arange(spec.draft_vocab_size)).tolist()
    terms: dict[int, list[torch.Tensor]] = {k: [] for k in range(STEPS)}
    for row in range(len(batch.input_ids)):
        for document in range(int(batch.documents[row].max()) + 1):
            span = batch.documents[row] == document
            states = document_states(
                spec, weights, embedded[row, span].double(), batch.aux_hidden[row, span].double(), STEPS
            )
            found = loss_terms(
                states,
                weights,
                batch.loss_mask[row, span].tolist(),
                batch.argmax[row, span].tolist(),
                batch.last_hidden[row, span].double(),
                vocabulary.target_head.double(),
                ids,
                STEPS,
            )
            for k, values in found.items():
                terms[k] += values
    assert all(terms.values()), "every step must have labels for the comparison to mean anything"
    expected = sum(0.8**k * torch.stack(terms[k]).mean() for k in range(STEPS)) / sum(0.8**k for k in range(STEPS))
    expected.backward()

    assert abs(loss.item() - expected.item()) <= 1e-5 * abs(expected.item())
    for name, parameter in draft.named_parameters():
        reference = weights[name].grad
        error = (parameter.grad.double() - reference).norm() / reference.norm()
        assert error <= 1e-5, f"{name}: {error}"
