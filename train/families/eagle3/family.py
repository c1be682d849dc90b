"""EAGLE-3 (arXiv 2503.01840) as a draft family.

Shapes: B rows, T tokens, K unrolled steps, H hidden size, L boundaries, I intermediate size, Vd draft vocabulary.
"""

import dataclasses
import math

import torch

from ...data.batch import Batch
from ...data.feature_noise import with_uniform_noise
from ...data.target_head import TargetHead
from ...layers.computed_rows import computed_rows
from ...loss.anchors import supervised_anchors
from ...loss.chunked_loss import Comparison, joint_loss
from ...loss.metrics import StepCounts, StepResults, decayed_weights, normalized_weights
from ..autoregressive import AutoregressiveProposer
from ..base import Cost, DraftFamily, StepContext, StoredFeatures, require_boundaries
from ..spec import target_geometry
from ..targets import TargetRecord
from .checkpoint import Eagle3Checkpoint
from .draft import Eagle3Draft
from .objective import Objective, unrolled_loss
from .settings import Eagle3Settings
from .spec import Eagle3Spec
from .unroll import unroll


class Eagle3Family(DraftFamily[Eagle3Settings, Eagle3Spec, Eagle3Draft]):
    """One decoder layer over auxiliary hidden states, trained by unrolling its own steps."""

    spec_type = Eagle3Spec
    checkpoint = Eagle3Checkpoint()
    from_target = frozenset({"embed_tokens.weight"})

    def make_spec(self, settings: Eagle3Settings, target: TargetRecord, stored: StoredFeatures) -> Eagle3Spec:
        geometry = target_geometry(target, settings)
        return Eagle3Spec(
            **geometry,
            boundaries=require_boundaries(settings.boundaries, stored, target.where),
            draft_vocab_size=min(settings.draft_vocab_size, geometry["vocab_size"]),
            norm_output=settings.norm_output,
            fc_norm=settings.fc_norm,
            norm_before_fc=settings.norm_before_fc,
            norm_before_residual=settings.norm_before_residual,
            sliding_window=settings.sliding_window,
            trained_embeddings=settings.train_embeddings,
        )

    def build(self, spec: Eagle3Spec) -> Eagle3Draft:
        return Eagle3Draft(spec)

    def initialize(self, draft: Eagle3Draft, head: TargetHead) -> None:
        with torch.no_grad():
            draft.lm_head.weight.copy_(head.lm_head_rows)
            if draft.spec.trained_embeddings:
                draft.embed_tokens.weight.copy_(head.embed_tokens)

    def proposer(
        self, draft: Eagle3Draft, vocabulary: torch.Tensor, embed_tokens: torch.Tensor, lm_head: torch.Tensor
    ) -> AutoregressiveProposer:
        return AutoregressiveProposer(draft, vocabulary, embed_tokens, lm_head)

    def loss_weights(self, settings: Eagle3Settings) -> tuple[float, ...]:
        if settings.step_weights:
            return normalized_weights(settings.step_weights)
        return decayed_weights(settings.ttt_steps, settings.step_decay)

    def draw_anchors(self, batch: Batch, settings: Eagle3Settings) -> torch.Tensor:
        return supervised_anchors(batch, settings.ttt_steps)

    def step(
        self, draft: Eagle3Draft, batch: Batch, settings: Eagle3Settings, context: StepContext
    ) -> tuple[torch.Tensor, list[StepCounts] | None]:
        if draft.training and settings.feature_noise:
            noisy = with_uniform_noise(batch.aux_hidden, batch, settings.feature_noise)
            batch = dataclasses.replace(batch, aux_hidden=noisy)
        return unrolled_loss(
            draft,
            context.embed_tokens,
            batch,
            context.vocabulary,
            Objective(loss=settings.loss, step_weights=self.loss_weights(settings)),
            dtype=context.dtype,
            labels=context.labels,
            with_metrics=context.with_metrics,
        )

    def predict(self, draft: Eagle3Draft, batch: Batch, context: StepContext) -> StepResults:
        assert batch.anchors is not None
        rows = computed_rows(batch, batch.anchors[0])
        outputs = unroll(draft, context.embed_tokens, batch, rows, len(batch.anchors), context.dtype)
        comparison = Comparison(
            batch=batch,
            rows=rows,
            anchors=batch.anchors.flatten(1),
            weights=torch.ones(len(batch.anchors), device=batch.anchors.device),
            vocabulary=context.vocabulary,
            loss="cross_entropy",
            dtype=context.dtype,
            with_metrics=True,
        )
        return joint_loss(outputs, draft.lm_head.weight, comparison)[1]

    def cost(self, spec: Eagle3Spec, settings: Eagle3Settings, tokens: float, supervised: float) -> Cost:
        """Count a batch's products; the target's head counts a third, as it has no backward pass.

        Kept are N (2LH + 4H + (n + 4m)D) numbers and, for each of K steps, R (8H + (3n + 4m)D + 3I), of N tokens and
        R anchors, n query and m key heads of dimension D; and the weights in the type that is multiplied in.
        """
        H, L, K, inner = spec.hidden_size, len(spec.boundaries), settings.ttt_steps, spec.intermediate_size
        queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        every = L * H * H + H * (queries + 4 * keys)
        step = H * (queries + 2 * keys) + queries * H + 3 * H * inner + H * spec.draft_vocab_size
        kept = tokens * ((2 * L + 4) * H + queries + 4 * keys)
        kept += K * supervised * tokens * (8 * H + 3 * queries + 4 * keys + 3 * inner)
        kept += sum(math.prod(shape) for shape in self.weight_shapes(spec).values())
        flops = 2 * tokens * (every + supervised * (K * step + H * spec.draft_vocab_size / 3))
        return Cost(forward_flops=flops, activation_numbers=kept)


FAMILY = Eagle3Family()
