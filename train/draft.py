"""The EAGLE-3 draft: one decoder layer that reads the target's hidden states.

Parameters carry the names of the exported checkpoint. ``unroll`` is training's
recurrence; ``evaluate.decoder`` runs the same weights with a KV cache, as engines do.

Shapes: B rows, T tokens of a row, H hidden size, L boundaries, D head dimension,
n heads, Vd draft vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .rope import rotary_embedding, rotate
from .spec import DraftSpec


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight brought to the input's type: autocast mixes them, and the fused kernel refuses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (…, H) to (…, H)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class DraftAttention(nn.Module):
    """Projections of the one attention; its inputs are the embedding and the hidden state, side by side."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            spec.num_attention_heads,
            spec.num_key_value_heads,
            spec.head_dim,
        )
        width = 2 * spec.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, spec.hidden_size, bias=False)

    def project(
        self, inputs: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map ``inputs`` (B, T, 2H) to rotated q, k and plain v, each (B, n, T, D), kv heads repeated."""
        queries, keys, values = (
            projection(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        groups = self.heads // self.kv_heads
        keys = rotate(keys, cos, sin).repeat_interleave(groups, dim=1)
        return rotate(queries, cos, sin), keys, values.repeat_interleave(groups, dim=1)

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """Map ``attended`` (B, n, T, D) to (B, T, H)."""
        mixed: torch.Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return mixed


class DraftMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (…, H) to (…, H)."""
        mixed: torch.Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return mixed


class DraftLayer(nn.Module):
    """The decoder layer, without the order in which attention meets its keys."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = DraftAttention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = DraftMLP(spec.hidden_size, spec.intermediate_size)

    def attention_inputs(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Norm and join embeddings and hidden states, both (B, T, H), to (B, T, 2H), embedding first."""
        return torch.cat((self.input_layernorm(embedded), self.hidden_norm(hidden)), dim=-1)

    def after_attention(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the residual stream (B, T, H) behind attention and MLP."""
        residual = hidden + self.self_attn.output(attended)
        streamed: torch.Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return streamed


class Draft(nn.Module):
    """A whole draft but for the embedding, which is the target's and frozen."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.spec = spec
        H, L = spec.hidden_size, len(spec.boundaries)
        self.fc = nn.Linear(L * H, H, bias=False)
        if spec.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(H, spec.rms_norm_eps) for _ in range(L))
        self.midlayer = DraftLayer(spec)
        self.norm = RMSNorm(H, spec.rms_norm_eps)
        self.lm_head = nn.Linear(H, spec.draft_vocab_size, bias=False)
        self.rotary = rotary_embedding(spec.model_dump())

    def fuse(self, aux_hidden: torch.Tensor) -> torch.Tensor:
        """Map auxiliary hidden states (B, T, L, H) to the first hidden state (B, T, H)."""
        if self.spec.fc_norm:
            normed = [norm(aux_hidden[..., i, :]) for i, norm in enumerate(self.fc_norm)]
            aux_hidden = torch.stack(normed, dim=-2)
        fused: torch.Tensor = self.fc(aux_hidden.flatten(-2))
        return fused

    def feedback(self, streamed: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Choose what the next step takes as its hidden state."""
        return normed if self.spec.norm_output else streamed

    def unroll(
        self,
        embedded: torch.Tensor,
        aux_hidden: torch.Tensor,
        positions: torch.Tensor,
        documents: torch.Tensor,
        steps: int,
    ) -> list[torch.Tensor]:
        """Run the test-time training recurrence (EAGLE-3, arXiv 2503.01840, section 3.2).

        embedded    (B, T, H)     embedding of each token
        aux_hidden  (B, T, L, H)  of each token
        positions   (B, T)        within the document
        documents   (B, T)        number of the document; tokens attend within theirs only

        Returns K = ``steps`` tensors (B, T, H): at anchor t of step k, the normed hidden state whose
        logits predict token t + k + 2. Step k reads the embedding of token t + k + 1, attends to step 0
        of anchors up to t and to its own anchor's earlier steps, and stands at position t + k.
        """
        is_visible = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        hidden = self.fuse(aux_hidden)
        attention = self.midlayer.self_attn
        own_keys: list[torch.Tensor] = []
        own_values: list[torch.Tensor] = []
        outputs = []
        for step in range(steps):
            ahead = F.pad(embedded[:, step + 1 :], (0, 0, 0, min(step + 1, embedded.shape[1])))
            cos, sin = self.rotary(hidden, positions + step)
            q, k, v = attention.project(self.midlayer.attention_inputs(ahead, hidden), cos, sin)
            if step == 0:
                first_keys, first_values = k, v
            else:
                own_keys.append(k)
                own_values.append(v)
            attended = _attend(q, first_keys, first_values, is_visible, own_keys, own_values)
            streamed = self.midlayer.after_attention(hidden, attended)
            normed = self.norm(streamed)
            outputs.append(normed)
            hidden = self.feedback(streamed, normed)
        return outputs


def _attend(
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
