"""Training's unrolled recurrence, computed only where it reaches the loss.

The same numbers as ``Draft.unroll`` at the anchors that count, with less work: the
embedding's share of q, k and v is projected once and taken at a later place by
each step, and what is not supervised gives keys and values of step 0 and no more.

Shapes: B rows, T tokens, N = B * T, R computed anchors, H hidden size, L boundaries,
D head dimension, n query heads, m key heads.
"""

import torch
from torch.nn import functional as F

from .attention import attend
from .batch import Batch
from .draft import Draft
from .mlp import swiglu_mlp
from .norm import normalised
from .rope import rotate_rows
from .rows import Rows


def unroll(
    draft: Draft, embed_tokens: torch.Tensor, batch: Batch, rows: Rows, steps: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return for each of ``steps`` the normed hidden states (R, H) whose logits predict token t + k + 2.

    ``embed_tokens`` (V, H) are the target's; matrices are multiplied in ``dtype``. A row whose anchor has
    no token t + k + 1 in its document holds values that mean nothing.
    """
    spec, layer, attention = draft.spec, draft.midlayer, draft.midlayer.self_attn
    H, D, eps = spec.hidden_size, spec.head_dim, spec.rms_norm_eps
    query_width = attention.heads * D
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([each.weight for each in projections])  # ((n + 2m) D, 2H)
    embedding_weight = (weight[:, :H] * layer.input_layernorm.weight).to(dtype)
    hidden_weight = (weight[:, H:] * layer.hidden_norm.weight).to(dtype)
    inner_weights = [
        (projection.weight * layer.post_attention_layernorm.weight).to(dtype)
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj)
    ]
    output_weight, down_weight = attention.o_proj.weight.to(dtype), layer.mlp.down_proj.weight.to(dtype)
    final_weight = draft.norm.weight.to(dtype)

    embedded = F.embedding(batch.input_ids.flatten(), embed_tokens).to(dtype)
    projected = F.linear(normalised(embedded, eps), embedding_weight)  # (N, (n + 2m) D)
    hidden = _fused(draft, batch.aux_hidden.flatten(0, 1).to(dtype))  # (N, H)
    positions = batch.positions.flatten()
    last = len(positions) - 1

    # Step 0: keys and values of all tokens, the rest of the computed ones.
    normed_hidden = normalised(hidden, eps)
    angles = _cos_sin(draft, [positions, *(positions[rows.flat] + step for step in range(steps))], dtype)
    following = torch.arange(1, last + 2, device=positions.device).clamp_(max=last)
    pairs = F.linear(normed_hidden, hidden_weight[query_width:]) + projected[:, query_width:].index_select(0, following)
    first_keys, first_values = pairs.unflatten(-1, (-1, D)).chunk(2, dim=1)  # (N, m, D)
    first_keys = rotate_rows(first_keys, *angles[0])
    hidden, normed_hidden = hidden.index_select(0, rows.flat), normed_hidden.index_select(0, rows.flat)

    later_keys: list[torch.Tensor] = []
    later_values: list[torch.Tensor] = []
    outputs = []
    for step in range(steps):
        ahead = (rows.flat + step + 1).clamp_(max=last)
        if step == 0:
            queries = F.linear(normed_hidden, hidden_weight[:query_width])
            queries = queries + projected[:, :query_width].index_select(0, ahead)
            q = rotate_rows(queries.unflatten(-1, (-1, D)), *angles[step + 1])
        else:
            mixed = F.linear(normalised(hidden, eps), hidden_weight) + projected.index_select(0, ahead)
            q, key, value = mixed.unflatten(-1, (-1, D)).split(
                (attention.heads, attention.kv_heads, attention.kv_heads), dim=1
            )
            q = rotate_rows(q, *angles[step + 1])
            later_keys.append(rotate_rows(key, *angles[step + 1]))
            later_values.append(value)
        attended = attend(q, first_keys, first_values, later_keys, later_values, rows, None)
        residual = hidden + F.linear(attended.flatten(1), output_weight)
        inner = normalised(residual, eps)
        streamed = residual + swiglu_mlp(inner, *inner_weights, down_weight)
        normed = normalised(streamed, eps) * final_weight
        outputs.append(normed)
        hidden = draft.feedback(streamed, normed)
    return outputs


def _fused(draft: Draft, aux_hidden: torch.Tensor) -> torch.Tensor:
    """Return ``Draft.fuse`` of the auxiliary hidden states (N, L, H)."""
    weight = draft.fc.weight
    if draft.spec.fc_norm:
        aux_hidden = normalised(aux_hidden, draft.spec.rms_norm_eps)
        weight = weight * torch.cat([norm.weight for norm in draft.fc_norm])
    return F.linear(aux_hidden.flatten(1), weight.to(aux_hidden.dtype))


def _cos_sin(
    draft: Draft, positions: list[torch.Tensor], dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return cos and sin (len, D/2) of each list of positions."""
    every = torch.cat(positions)
    cos, sin = (each[0, :, : each.shape[-1] // 2] for each in draft.rotary(every.to(dtype), every[None]))
    lengths = [len(each) for each in positions]
    return list(zip(cos.split(lengths), sin.split(lengths), strict=True))
