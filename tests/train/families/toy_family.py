"""A draft family from outside, in one file: heads that look ahead from the last hidden state, as Medusa's do.

Head k adds ``silu(W_k h)`` to the last hidden state h of an anchor (Medusa, arXiv 2401.10774, section 2.1.1); the
target's head, frozen, makes logits of it. All K tokens are proposed at once. An installed package would add it by

    [project.entry-points."specx.draft_families"]
    toy = "its_module:TOY"

Shapes: B rows, T tokens, K heads, H hidden size, V target vocabulary, R computed anchors.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from specx.train.data.batch import Batch
from specx.train.errors import TrainError
from specx.train.families.base import Cost, DraftFamily, DraftModel, StepContext, StoredFeatures
from specx.train.families.checkpoint import DraftCheckpoint, Engine, Form, Format
from specx.train.families.settings import FamilyEntry, FamilySettings
from specx.train.families.spec import DraftSpec, target_geometry
from specx.train.families.targets import TargetRecord
from specx.train.layers.computed_rows import computed_rows
from specx.train.loss.anchors import count_labels, supervised_anchors
from specx.train.loss.chunked_loss import Comparison, joint_loss, step_counts
from specx.train.loss.metrics import StepCounts, StepResults


class ToySettings(FamilySettings):
    """Heads that look ahead."""

    method: Literal["toy"] = "toy"
    """Draft family to train; by default that of --preset, or eagle3."""
    heads: int = Field(default=3, ge=1)
    """Tokens that are proposed at once, K."""
    anchor_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the supervised anchors, drawn at random, that a batch is trained on."""


class ToySpec(DraftSpec):
    """What a toy draft is."""

    method: Literal["toy"] = "toy"
    heads: int


class ToyDraft(DraftModel):
    """One matrix a head."""

    def __init__(self, spec: ToySpec) -> None:
        super().__init__()
        self.spec: ToySpec = spec
        self.rotary = None
        self.heads = nn.ModuleList(nn.Linear(spec.hidden_size, spec.hidden_size, bias=False) for _ in range(spec.heads))

    def forward(self, last_hidden: torch.Tensor) -> list[torch.Tensor]:
        """Map last hidden states (R, H) to those of the K tokens ahead, (R, H) each."""
        return [last_hidden + F.silu(head(last_hidden)) for head in self.heads]


class ToyProposer:
    """Proposes from the newest last hidden state alone."""

    def __init__(self, draft: ToyDraft, lm_head: torch.Tensor) -> None:
        self._draft, self._lm_head = draft, lm_head
        self._hidden = torch.zeros(1, draft.spec.hidden_size)

    def extend(self, next_ids: list[int], features: torch.Tensor) -> None:
        self._hidden = features[-1:]

    @torch.inference_mode()
    def propose(self, count: int) -> list[int]:
        ahead = torch.cat(self._draft(self._hidden)[:count])
        proposed: list[int] = F.linear(ahead, self._lm_head).argmax(-1).tolist()
        return proposed


class ToyCheckpoint(DraftCheckpoint[ToySpec]):
    """A layout of its own, which no engine serves."""

    engines = ()

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        return config.get("architectures") == ["ToyHeads"]

    def refusal(self, spec: ToySpec, chosen: Format, engine: Engine) -> str | None:
        return "no engine serves it"

    def config(self, spec: ToySpec, dtype: str, form: Form) -> dict[str, Any]:
        return spec.model_dump(mode="json") | {"architectures": ["ToyHeads"], "dtype": dtype}

    def spec_of(self, config: Mapping[str, Any], tensors: Iterable[str]) -> ToySpec:
        return ToySpec.model_validate({key: config[key] for key in ToySpec.model_fields})


class ToyFamily(DraftFamily[ToySettings, ToySpec, ToyDraft]):
    """Heads that look ahead from the last hidden state."""

    spec_type = ToySpec
    checkpoint = ToyCheckpoint()
    has_rotary = False

    def make_spec(self, settings: ToySettings, target: TargetRecord, stored: StoredFeatures) -> ToySpec:
        if not stored.last_hidden:
            raise TrainError(f"{target.where}: has no last hidden states. Extract again with --last-hidden.")
        geometry = target_geometry(target, settings)
        return ToySpec(**geometry, boundaries=(), draft_vocab_size=geometry["vocab_size"], heads=settings.heads)

    def build(self, spec: ToySpec) -> ToyDraft:
        return ToyDraft(spec)

    def proposer(
        self, draft: ToyDraft, vocabulary: torch.Tensor, embed_tokens: torch.Tensor, lm_head: torch.Tensor
    ) -> ToyProposer:
        return ToyProposer(draft, lm_head)

    def loss_weights(self, settings: ToySettings) -> tuple[float, ...]:
        return (1 / settings.heads,) * settings.heads

    def draw_anchors(self, batch: Batch, settings: ToySettings) -> torch.Tensor:
        assert batch.seeds is not None
        anchors = supervised_anchors(batch, settings.heads)
        for row, documents in enumerate(batch.documents):
            for document in range(int(documents.max()) + 1):
                generator = torch.Generator().manual_seed(int(batch.seeds[row, document]))
                here = documents == document
                drawn = torch.rand(int(here.sum()), generator=generator) < settings.anchor_share
                anchors[:, row, here] &= drawn
        return anchors

    def step(
        self, draft: ToyDraft, batch: Batch, settings: ToySettings, context: StepContext
    ) -> tuple[torch.Tensor, list[StepCounts] | None]:
        assert batch.anchors is not None
        labels = context.labels
        if labels is None:
            labels = count_labels(batch, batch.anchors, context.vocabulary.t2d)
        weights = labels.new_tensor(self.loss_weights(settings)) / labels.clamp(min=1)
        loss, comparison, results = self._compare(draft, batch, context, weights)
        return loss, step_counts(comparison, results)

    def predict(self, draft: ToyDraft, batch: Batch, context: StepContext) -> StepResults:
        assert batch.anchors is not None
        weights = torch.ones(len(batch.anchors), device=batch.anchors.device)
        with torch.no_grad():
            return self._compare(draft, batch, context, weights)[2]

    def _compare(
        self, draft: ToyDraft, batch: Batch, context: StepContext, weights: torch.Tensor
    ) -> tuple[torch.Tensor, Comparison, StepResults]:
        assert batch.anchors is not None
        assert batch.last_hidden is not None
        steps = len(batch.anchors)
        if steps > draft.spec.heads:
            raise TrainError(f"a toy draft proposes {draft.spec.heads} tokens, {steps} asked for.")
        rows = computed_rows(batch, batch.anchors[0])
        outputs = draft(batch.last_hidden.flatten(0, 1)[rows.flat].to(draft.heads[0].weight.dtype))[:steps]
        comparison = Comparison(
            batch=batch,
            rows=rows,
            anchors=batch.anchors.flatten(1),
            weights=weights,
            vocabulary=context.vocabulary,
            loss="cross_entropy",
            dtype=context.dtype,
            with_metrics=True,
        )
        loss, results = joint_loss(outputs, context.vocabulary.target_head, comparison)
        return loss, comparison, results

    def cost(self, spec: ToySpec, settings: ToySettings, tokens: float, supervised: float) -> Cost:
        anchors, H = tokens * supervised, spec.hidden_size
        of_heads = settings.heads * H * (H + spec.vocab_size) + H * spec.vocab_size / 3
        return Cost(forward_flops=2 * anchors * of_heads, activation_numbers=anchors * H * (1 + 2 * settings.heads))


FAMILY = ToyFamily()
TOY = FamilyEntry(
    settings=ToySettings,
    presets={"toy": {"heads": 3, "lr": 1e-3}},
    implementation="specx.tests.train.families.toy_family:FAMILY",
)
