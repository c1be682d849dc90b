"""The EAGLE-3 draft: one decoder layer that reads the target's hidden states.

Parameters carry the names of the exported checkpoint. ``unroll`` runs training's recurrence over them;
``autoregressive`` runs them with a KV cache, as engines do.

Shapes: B rows, T tokens of a row, H hidden size, L boundaries.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ...layers.modules import DraftAttention, DraftMLP, RMSNorm
from ...rope.rotary import RotaryEmbedding
from ..autoregressive import AutoregressiveDraft
from .spec import Eagle3Spec


class DraftLayer(nn.Module):
    """The decoder layer, without the order in which attention meets its keys."""

    def __init__(self, spec: Eagle3Spec) -> None:
        super().__init__()
        self.norm_before_residual = spec.norm_before_residual
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = DraftAttention(
            width=2 * spec.hidden_size,
            heads=spec.num_attention_heads,
            kv_heads=spec.num_key_value_heads,
            head_dim=spec.head_dim,
            hidden_size=spec.hidden_size,
        )
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = DraftMLP(spec.hidden_size, spec.intermediate_size)

    def attention_inputs(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Norm and join embeddings and hidden states, both (B, T, H), to (B, T, 2H), embedding first."""
        return torch.cat((self.input_layernorm(embedded), self.hidden_norm(hidden)), dim=-1)

    def after_attention(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the residual stream (B, T, H) behind attention and MLP."""
        start = self.hidden_norm(hidden) if self.norm_before_residual else hidden
        residual = start + self.self_attn.output(attended)
        streamed: torch.Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return streamed


class Eagle3Draft(AutoregressiveDraft):
    """A whole draft, but for the embedding where that is the target's, and frozen."""

    def __init__(self, spec: Eagle3Spec) -> None:
        super().__init__()
        self.spec: Eagle3Spec = spec
        self.window = spec.sliding_window
        H, L = spec.hidden_size, len(spec.boundaries)
        self.fc = nn.Linear(L * H, H, bias=False)
        if spec.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(H, spec.rms_norm_eps) for _ in range(L))
        if spec.norm_before_fc:
            self.input_norm = RMSNorm(L * H, spec.rms_norm_eps)
        if spec.trained_embeddings:
            self.embed_tokens = nn.Embedding(spec.vocab_size, H)
        self.midlayer = DraftLayer(spec)
        self.norm = RMSNorm(H, spec.rms_norm_eps)
        self.lm_head = nn.Linear(H, spec.draft_vocab_size, bias=False)
        self.rotary = RotaryEmbedding(spec.head_dim, spec.rope_parameters)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Map auxiliary hidden states (B, T, L, H) to the first hidden state (B, T, H)."""
        aux_hidden = features
        if self.spec.fc_norm:
            normed = [norm(aux_hidden[..., i, :]) for i, norm in enumerate(self.fc_norm)]
            aux_hidden = torch.stack(normed, dim=-2)
        joined = aux_hidden.flatten(-2)  # (B, T, L*H)
        if self.spec.norm_before_fc:
            joined = self.input_norm(joined)
        fused: torch.Tensor = self.fc(joined)
        return fused

    def embed(self, input_ids: torch.Tensor, target_embeddings: torch.Tensor) -> torch.Tensor:
        """Map ids (B, T) to embeddings (B, T, H): the draft's own, or those of the target (V, H)."""
        own = self.embed_tokens.weight if self.spec.trained_embeddings else target_embeddings
        return F.embedding(input_ids, own)

    @property
    def attention(self) -> DraftAttention:
        """The one attention."""
        return self.midlayer.self_attn

    def enter(self, embedded: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what attention reads (B, T, 2H), and what ``leave`` is to be given (B, T, H)."""
        return self.midlayer.attention_inputs(embedded, hidden), hidden

    def leave(self, entered: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the head reads and what the next step takes as its hidden state, both (B, T, H)."""
        streamed = self.midlayer.after_attention(entered, attended)
        normed = self.norm(streamed)
        return normed, self.feedback(streamed, normed)

    def head(self, target_head: torch.Tensor) -> torch.Tensor:
        """Return the draft's own head (Vd, H)."""
        return self.lm_head.weight

    def feedback(self, streamed: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Choose what the next step takes as its hidden state."""
        return normed if self.spec.norm_output else streamed
