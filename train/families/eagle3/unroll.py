"""Training's unrolled recurrence, computed only where it reaches the loss.

Step k at anchor t reads the embedding of token t + k + 1, attends to step 0 of the anchors up to t and to its
own anchor's later steps, and stands at position t + k (test-time training, EAGLE-3, arXiv 2503.01840, section
3.2). The embedding's share of q, k and v is projected once and taken at a later place by each step; what is not
supervised gives keys and values of step 0 and no more.

Shapes: B rows, T tokens, N = B * T, R computed anchors, H hidden size, L boundaries,
D head dimension, n query heads, m key heads.
"""

import torch

from ...data.batch import Batch
from ...layers.attention import attend
from ...layers.computed_rows import Rows
from ...layers.linear import linear
from ...layers.rms_norm import normalised
from ...layers.swiglu import add_swiglu_mlp
from ...rope.rotary import rotate_rows
from .draft import Eagle3Draft


def unroll(
    draft: Eagle3Draft, embed_tokens: torch.Tensor, batch: Batch, rows: Rows, steps: int, dtype: torch.dtype
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
    gate_up = torch.cat((layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight))  # (2I, H)
    gate_up_weight = (gate_up * layer.post_attention_layernorm.weight).to(dtype)
    output_weight, down_weight = attention.o_proj.weight.to(dtype), layer.mlp.down_proj.weight.to(dtype)
    residual_weight = layer.hidden_norm.weight.to(dtype)

    embedded = draft.embed(batch.input_ids.flatten(), embed_tokens)
    projected = linear(normalised(embedded, eps).to(dtype), embedding_weight)  # (N, (n + 2m) D)
    hidden = _fused(draft, batch.aux_hidden.flatten(0, 1).to(dtype))  # (N, H)
    positions = batch.positions.flatten()
    last = len(positions) - 1

    # Step 0: keys and values of all tokens, the rest of the computed ones.
    normed_hidden = normalised(hidden, eps)
    angles = _cos_sin(draft, [positions, *(positions[rows.flat] + step for step in range(steps))], dtype)
    following = torch.arange(1, last + 2, device=positions.device).clamp_(max=last)
    from_embeddings = projected[:, query_width:].index_select(0, following)
    pairs = linear(normed_hidden, hidden_weight[query_width:], from_embeddings)
    first_keys, first_values = _heads(pairs, D).chunk(2, dim=1)  # (N, m, D)
    first_keys = rotate_rows(first_keys, *angles[0])
    hidden, normed_hidden = hidden.index_select(0, rows.flat), normed_hidden.index_select(0, rows.flat)

    later_keys: list[torch.Tensor] = []
    later_values: list[torch.Tensor] = []
    outputs = []
    for step in range(steps):
        ahead = (rows.flat + step + 1).clamp_(max=last)
        if step == 0:
            from_embeddings = projected[:, :query_width].index_select(0, ahead)
            queries = linear(normed_hidden, hidden_weight[:query_width], from_embeddings)
            q = rotate_rows(_heads(queries, D), *angles[step + 1])
        else:
            normed_hidden = normalised(hidden, eps)
            mixed = linear(normed_hidden, hidden_weight, projected.index_select(0, ahead))
            counts = [attention.heads, attention.kv_heads, attention.kv_heads]
            q, key, value = torch.split_with_sizes(_heads(mixed, D), counts, dim=1)
            q = rotate_rows(q, *angles[step + 1])
            later_keys.append(rotate_rows(key, *angles[step + 1]))
            later_values.append(value)
        attended = attend(q, first_keys, first_values, later_keys, later_values, rows, spec.sliding_window)
        start = normed_hidden * residual_weight if spec.norm_before_residual else hidden
        residual = linear(attended.flatten(1), output_weight, start)
        inner = normalised(residual, eps)
        streamed = add_swiglu_mlp(residual, inner, gate_up_weight, down_weight)
        normed = normalised(streamed, eps, draft.norm.weight)
        outputs.append(normed)
        hidden = draft.feedback(streamed, normed)
    return outputs


def _fused(draft: Eagle3Draft, aux_hidden: torch.Tensor) -> torch.Tensor:
    """Return ``Eagle3Draft.fuse`` of the auxiliary hidden states (N, L, H)."""
    weight = draft.fc.weight
    if draft.spec.fc_norm:
        aux_hidden = normalised(aux_hidden, draft.spec.rms_norm_eps)
        weight = weight * torch.cat([norm.get_parameter("weight") for norm in draft.fc_norm])
    joined = aux_hidden.flatten(1)
    if draft.spec.norm_before_fc:
        joined = normalised(joined, draft.spec.rms_norm_eps)
        weight = weight * draft.input_norm.weight
    return linear(joined, weight.to(joined.dtype))


def _cos_sin(
    draft: Eagle3Draft, positions: list[torch.Tensor], dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return cos and sin (…, half of what is rotated) of each of some positions (…,)."""
    every = torch.cat(positions)
    cos, sin = (each[0, :, : each.shape[-1] // 2] for each in draft.rotary(every.to(dtype), every[None]))
    lengths = [len(each) for each in positions]
    return list(zip(cos.split(lengths), sin.split(lengths), strict=True))


def _heads(projected: torch.Tensor, head_dim: int) -> torch.Tensor:
    """View (M, heads D) as (M, heads, D)."""
    return torch.unflatten(projected, -1, (-1, head_dim))
