"""EAGLE-1 (arXiv 2401.15077) as a draft family.

Shapes: B rows, T tokens, H hidden size, I intermediate size, V vocabulary.
"""

import math

import torch

from ...data.batch import Batch
from ...data.feature_noise import with_uniform_noise
from ...errors import TrainError
from ...layers.computed_rows import computed_rows
from ...loss.anchors import supervised_anchors
from ...loss.chunked_loss import Comparison, joint_loss
from ...loss.metrics import StepCounts, StepResults, total_loss
from ..autoregressive import AutoregressiveProposer, unroll_plainly
from ..base import Cost, DraftFamily, StepContext, StoredFeatures
from ..spec import target_geometry
from ..targets import TargetRecord
from .checkpoint import Eagle1Checkpoint
from .draft import Eagle1Draft
from .objective import feature_loss
from .settings import Eagle1Settings
from .spec import Eagle1Spec


class Eagle1Family(DraftFamily[Eagle1Settings, Eagle1Spec, Eagle1Draft]):
    """One decoder layer that predicts the next last hidden state, trained on the target's own ones."""

    spec_type = Eagle1Spec
    checkpoint = Eagle1Checkpoint()

    def make_spec(self, settings: Eagle1Settings, target: TargetRecord, stored: StoredFeatures) -> Eagle1Spec:
        if not stored.last_hidden:
            raise TrainError(
                f"{target.where}: has no last hidden states, which EAGLE-1 is trained on. Extract again with "
                "--last-hidden."
            )
        geometry = target_geometry(target, settings)
        return Eagle1Spec(**geometry, boundaries=(), draft_vocab_size=geometry["vocab_size"])

    def build(self, spec: Eagle1Spec) -> Eagle1Draft:
        return Eagle1Draft(spec)

    def proposer(
        self, draft: Eagle1Draft, vocabulary: torch.Tensor, embed_tokens: torch.Tensor, lm_head: torch.Tensor
    ) -> AutoregressiveProposer:
        return AutoregressiveProposer(draft, vocabulary, embed_tokens, lm_head)

    def loss_weights(self, settings: Eagle1Settings) -> tuple[float, ...]:
        return (1.0,)

    def draw_anchors(self, batch: Batch, settings: Eagle1Settings) -> torch.Tensor:
        return supervised_anchors(batch, 1)

    def step(
        self, draft: Eagle1Draft, batch: Batch, settings: Eagle1Settings, context: StepContext
    ) -> tuple[torch.Tensor, list[StepCounts] | None]:
        assert batch.last_hidden is not None
        dtype = draft.fc.weight.dtype
        features = batch.last_hidden.to(dtype)
        if draft.training and settings.feature_noise:
            features = with_uniform_noise(features, batch, settings.feature_noise)
        counts = feature_loss(
            draft,
            draft.embed(batch.input_ids, context.embed_tokens).to(dtype),
            features,
            batch,
            context.vocabulary,
            logit_loss_weight=settings.logit_loss_weight,
        )
        return total_loss(counts, self.loss_weights(settings), context.labels), counts

    def predict(self, draft: Eagle1Draft, batch: Batch, context: StepContext) -> StepResults:
        assert batch.anchors is not None
        if batch.last_hidden is None:
            raise TrainError("an EAGLE-1 draft reads last hidden states, which the store lacks. Give another --store.")
        rows = computed_rows(batch, batch.anchors[0])
        features = batch.last_hidden.flatten(0, 1).to(context.dtype)
        outputs = unroll_plainly(draft, features, context.embed_tokens, batch, rows, len(batch.anchors))
        vocabulary = context.vocabulary
        comparison = Comparison(
            batch=batch,
            rows=rows,
            anchors=batch.anchors.flatten(1),
            weights=torch.ones(len(batch.anchors), device=batch.anchors.device),
            vocabulary=vocabulary,
            loss="cross_entropy",
            dtype=context.dtype,
            with_metrics=True,
            draft_transform=vocabulary.head_transform,
        )
        with torch.no_grad():
            return joint_loss(outputs, vocabulary.target_head, comparison)[1]

    def cost(self, spec: Eagle1Spec, settings: Eagle1Settings, tokens: float, supervised: float) -> Cost:
        """Count a batch's products: the layer over all tokens, and the target's head twice over the anchors.

        Of the head only the draft's side has a backward pass. Kept are N (10H + (3n + 4m)D + 3I) numbers of N tokens,
        n query and m key heads of dimension D; and the weights in the type that is multiplied in.
        """
        H, inner = spec.hidden_size, spec.intermediate_size
        queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        layer = 2 * H * H + H * (queries + 2 * keys) + queries * H + 3 * H * inner
        kept = tokens * (10 * H + 3 * queries + 4 * keys + 3 * inner)
        kept += sum(math.prod(shape) for shape in self.weight_shapes(spec).values())
        return Cost(
            forward_flops=2 * tokens * (layer + supervised * H * spec.vocab_size * 5 / 3), activation_numbers=kept
        )


FAMILY = Eagle1Family()
