"""The training step as one would write it down: eager, dense, every logit in memory.

What the fast step is compared with, in tests and in benchmarks.

Shapes: B rows, T tokens, K steps, H hidden size, D head dimension, n heads, Vd draft
vocabulary, R supervised anchors of one step.
"""

import torch
from torch.nn import functional as F

from specx.train.data.batch import Batch
from specx.train.families.eagle3.draft import Eagle3Draft
from specx.train.loss.anchors import supervised_anchors
from specx.train.loss.target_distribution import Vocabulary


def unroll(
    draft: Eagle3Draft,
    embedded: torch.Tensor,
    aux_hidden: torch.Tensor,
    positions: torch.Tensor,
    documents: torch.Tensor,
    steps: int,
) -> list[torch.Tensor]:
    """Return K tensors (B, T, H), the normed hidden states of every anchor.

    embedded    (B, T, H)     embedding of each token
    aux_hidden  (B, T, L, H)  of each token
    positions   (B, T)        within the document
    documents   (B, T)        number of the document; tokens attend within theirs only
    """
    is_causal = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # (B, 1, T, T)
    window = draft.spec.sliding_window
    hidden = draft.fuse(aux_hidden)
    own_keys: list[torch.Tensor] = []
    own_values: list[torch.Tensor] = []
    outputs = []
    for step in range(steps):
        ahead = F.pad(embedded[:, step + 1 :], (0, 0, 0, min(step + 1, embedded.shape[1])))
        cos, sin = draft.rotary(hidden, positions + step)
        inputs, entered = draft.enter(ahead, hidden)
        q, k, v = draft.attention.project(inputs, cos, sin)
        if step == 0:
            first_keys, first_values = k, v
        else:
            own_keys.append(k)
            own_values.append(v)
        # The query stands at t + k; its own anchor's later keys are nearer than any of step 0.
        is_visible = is_causal if window is None else is_causal.triu(step - window + 1)
        attended = attend(q, first_keys, first_values, is_visible, own_keys, own_values)
        normed, hidden = draft.leave(entered, attended)
        outputs.append(normed)
    return outputs


def attend(
    q: torch.Tensor,
    first_keys: torch.Tensor,
    first_values: torch.Tensor,
    is_visible: torch.Tensor,
    own_keys: list[torch.Tensor],
    own_values: list[torch.Tensor],
) -> torch.Tensor:
    """Attend to step 0 of the visible anchors and to the own anchor's later steps; all (B, n, T, D)."""
    scale = q.shape[-1] ** -0.5
    scores = (q @ first_keys.transpose(-1, -2)).float() * scale  # (B, n, T, T)
    scores = scores.masked_fill(~is_visible, float("-inf"))
    own = [(q * key).sum(-1, dtype=torch.float32) * scale for key in own_keys]  # (B, n, T) each
    weights = torch.cat((scores, *(score[..., None] for score in own)), dim=-1).softmax(-1).to(q.dtype)
    T = first_keys.shape[2]
    attended = weights[..., :T] @ first_values
    for i, value in enumerate(own_values):
        attended = attended + weights[..., T + i, None] * value
    return attended


def loss(
    draft: Eagle3Draft,
    embed_tokens: torch.Tensor,
    batch: Batch,
    vocabulary: Vocabulary,
    weights: tuple[float, ...],
) -> torch.Tensor:
    """Return the weighted mean cross-entropy over the steps, with exact labels."""
    embedded = draft.embed(batch.input_ids, embed_tokens).to(draft.fc.weight.dtype)
    aux_hidden = batch.aux_hidden.to(draft.fc.weight.dtype)
    outputs = unroll(draft, embedded, aux_hidden, batch.positions, batch.documents, len(weights))
    return loss_of(draft, outputs, batch, vocabulary, weights)


def loss_of(
    draft: Eagle3Draft,
    outputs: list[torch.Tensor],
    batch: Batch,
    vocabulary: Vocabulary,
    weights: tuple[float, ...],
) -> torch.Tensor:
    """Return the same of normed hidden states (B, T, H)."""
    assert batch.last_hidden is not None
    total = torch.zeros((), device=batch.input_ids.device)
    for step, (weight, anchors) in enumerate(zip(weights, supervised_anchors(batch, len(weights)), strict=True)):
        row, t = anchors.nonzero(as_tuple=True)  # (R,)
        seen = t + step + 1
        logits = draft.lm_head(outputs[step][row, t]).float()  # (R, Vd)
        head = vocabulary.target_head
        p = F.linear(batch.last_hidden[row, seen].to(head.dtype), head).float().softmax(-1)
        cross_entropy = logits.logsumexp(-1) - (p * logits).sum(-1)
        has_label = vocabulary.t2d[batch.argmax[row, seen]]
        total = total + weight * (cross_entropy * has_label).sum() / has_label.sum().clamp(min=1)
    return total
