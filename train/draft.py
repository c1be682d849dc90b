"""The EAGLE-3 draft: one decoder layer that reads the target's hidden states.

Parameters carry the names of the exported checkpoint. ``unroll`` is training's
recurrence; ``evaluate.decoder`` runs the same weights with a KV cache, as engines do.

Shapes: B rows, T tokens of a row, H hidden size, L boundaries, D head dimension,
n heads, Vd draft vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .layers import DraftAttention, DraftMLP, RMSNorm
from .rope import rotary_embedding
from .spec import DraftSpec


class DraftLayer(nn.Module):
    """The decoder layer, without the order in which attention meets its keys."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.norm_before_residual = spec.norm_before_residual
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = DraftAttention(spec, 2 * spec.hidden_size)
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


class Draft(nn.Module):
    """A whole draft, but for the embedding where that is the target's, and frozen."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.spec = spec
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
        self.rotary = rotary_embedding(spec.model_dump())

    def fuse(self, aux_hidden: torch.Tensor) -> torch.Tensor:
        """Map auxiliary hidden states (B, T, L, H) to the first hidden state (B, T, H)."""
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
        of anchors up to t (behind t + k - W with a window of W) and to its own anchor's earlier steps, and
        stands at position t + k.
        """
        is_causal = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        window = self.spec.sliding_window
        hidden = self.fuse(aux_hidden)
        own_keys: list[torch.Tensor] = []
        own_values: list[torch.Tensor] = []
        outputs = []
        for step in range(steps):
            ahead = F.pad(embedded[:, step + 1 :], (0, 0, 0, min(step + 1, embedded.shape[1])))
            cos, sin = self.rotary(hidden, positions + step)
            inputs, entered = self.enter(ahead, hidden)
            q, k, v = self.attention.project(inputs, cos, sin)
            if step == 0:
                first_keys, first_values = k, v
            else:
                own_keys.append(k)
                own_values.append(v)
            # The query stands at t + k; its own anchor's later keys are nearer than any of step 0.
            is_visible = is_causal if window is None else is_causal.triu(step - window + 1)
            attended = _attend(q, first_keys, first_values, is_visible, own_keys, own_values)
            normed, hidden = self.leave(entered, attended)
            outputs.append(normed)
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
