"""The seam of a draft family: what training, export, evaluation and the dry run ask of it.

Shapes: B rows, T tokens, N = B * T, K drafted positions, H hidden size, V target vocabulary, Vd draft vocabulary,
L boundaries.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from ..data.batch import Batch
from ..data.target_head import TargetHead
from ..errors import TrainError
from ..loss.anchors import count_labels
from ..loss.metrics import StepCounts, StepResults
from ..loss.target_distribution import Vocabulary
from ..rope.rotary import RotaryEmbedding
from .checkpoint import DraftCheckpoint
from .settings import FamilySettings
from .spec import DraftSpec
from .targets import TargetRecord


class DraftModel(nn.Module):
    """A draft without what is the target's and frozen; its parameters have the names of the trained tensors."""

    spec: DraftSpec
    rotary: RotaryEmbedding | None
    """None for a draft without rotary position embedding; no default here, which would hide the submodule."""


SettingsT = TypeVar("SettingsT", bound=FamilySettings)
SpecT = TypeVar("SpecT", bound=DraftSpec)
DraftT = TypeVar("DraftT", bound=DraftModel)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFeatures:
    """What a store has of each token."""

    boundaries: tuple[int, ...]
    last_hidden: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StepContext:
    """What a training step needs beside draft and batch."""

    embed_tokens: torch.Tensor
    """(V, H), the target's"""
    vocabulary: Vocabulary
    dtype: torch.dtype
    """Matrices are multiplied in it."""
    labels: torch.Tensor | None = None
    """(K,) float32, labels of the whole optimizer step; None if it has no other batch"""
    with_metrics: bool = True
    """Whether sums are wanted; a family may return them anyway."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a batch costs, counted from shapes."""

    forward_flops: float
    """Of the matrix products of a forward pass."""
    activation_numbers: float
    """Numbers kept from the forward pass for the backward pass, in the type that matrices are multiplied in."""


class Proposer(Protocol):
    """Drafts for one sequence; ``extend`` follows the target, ``propose`` runs ahead of it."""

    def extend(self, next_ids: list[int], features: torch.Tensor) -> None:
        """Take in T verified tokens: the id after each one, and its features.

        Those are auxiliary hidden states (T, L, H), or last hidden states (T, H) of a draft without boundaries.
        """
        ...

    def propose(self, count: int) -> list[int]:
        """Return the target ids of ``count`` drafted tokens, greedily; the state stays that of the last ``extend``."""
        ...


class DraftFamily(ABC, Generic[SettingsT, SpecT, DraftT]):
    """A draft family. Its ``FamilyEntry`` names an instance as ``implementation``."""

    spec_type: type[SpecT]
    checkpoint: DraftCheckpoint[SpecT]
    from_target: frozenset[str] = frozenset()
    """Tensors that ``initialize`` fills, which an earlier draft that a run starts from may lack."""
    has_rotary = True
    """Whether its drafts have rotary position embedding, whose angles must be the target's."""

    @abstractmethod
    def make_spec(self, settings: SettingsT, target: TargetRecord, stored: StoredFeatures) -> SpecT:
        """Return the draft of a target. Raises TrainError if the store lacks what it reads."""

    @abstractmethod
    def build(self, spec: SpecT) -> DraftT:
        """Return a draft with random weights."""

    def initialize(self, draft: DraftT, head: TargetHead) -> None:
        """Fill in the weights that start from the target's; by default none does."""

    @abstractmethod
    def proposer(
        self, draft: DraftT, vocabulary: torch.Tensor, embed_tokens: torch.Tensor, lm_head: torch.Tensor
    ) -> Proposer:
        """Return what drafts for one sequence, step by step as engines do.

        ``vocabulary`` (Vd,) int64 are the target ids of the draft's; ``embed_tokens`` and ``lm_head`` (V, H) are the
        target's.
        """

    @abstractmethod
    def loss_weights(self, settings: SettingsT) -> tuple[float, ...]:
        """Return the weight of each of the K drafted positions in the loss, with a sum of 1."""

    @abstractmethod
    def draw_anchors(self, batch: Batch, settings: SettingsT) -> torch.Tensor:
        """Return the anchors (K, B, T) bool of each drafted position that a batch is trained on.

        They are drawn once, where the batch is read, and travel in it. A draw at random depends on the batch alone.
        """

    def count_labels(self, batch: Batch, t2d: torch.Tensor) -> torch.Tensor:
        """Return (K,) float32: labels of ``batch.anchors``, without running the draft; ``t2d`` (V,) bool."""
        assert batch.anchors is not None
        return count_labels(batch, batch.anchors, t2d)

    @abstractmethod
    def step(
        self, draft: DraftT, batch: Batch, settings: SettingsT, context: StepContext
    ) -> tuple[torch.Tensor, list[StepCounts] | None]:
        """Compare what the draft predicts at ``batch.anchors`` with the target; return the loss and each step's sums.

        The loss has gradients where autograd is on. With ``context.labels`` the losses of all batches of an optimizer
        step add up to the mean over all their labels.
        """

    @abstractmethod
    def predict(self, draft: DraftT, batch: Batch, context: StepContext) -> StepResults:
        """Return what the draft proposes at ``batch.anchors`` from stored features, for the offline estimate.

        ``proposed`` (K, N) and ``overlap`` (K,) are read; the loss is not.
        """

    @abstractmethod
    def cost(self, spec: SpecT, settings: SettingsT, tokens: float, supervised: float) -> Cost:
        """Return the cost of a batch of ``tokens`` tokens, a share ``supervised`` of which are anchors."""

    def anchors(self, settings: SettingsT) -> "Anchors":
        """Return what draws anchors and counts labels where the batches of a run are read."""
        return Anchors(family=self, settings=settings)

    def weight_shapes(self, spec: SpecT) -> dict[str, tuple[int, ...]]:
        """Return the shape of every trained tensor, from the module on the meta device."""
        with torch.device("meta"):
            draft = self.build(spec)
        return {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchors:
    """A family's anchors in a run of some settings."""

    family: DraftFamily[Any, Any, Any]
    settings: FamilySettings

    def draw(self, batch: Batch) -> torch.Tensor:
        """Return the anchors (K, B, T) bool of a batch."""
        return self.family.draw_anchors(batch, self.settings)

    def count_labels(self, batch: Batch, t2d: torch.Tensor) -> torch.Tensor:
        """Return (K,) float32: labels that count at a batch's anchors, given the draft vocabulary ``t2d`` (V,) bool."""
        return self.family.count_labels(batch, t2d)


def require_boundaries(boundaries: Sequence[int] | None, stored: StoredFeatures, where: str) -> tuple[int, ...]:
    """Return the boundaries asked for, or all that are stored; raise TrainError for one that is not stored."""
    chosen = tuple(boundaries or stored.boundaries)
    if missing := sorted(set(chosen) - set(stored.boundaries)):
        raise TrainError(
            f"{where}: boundary {missing[0]} is not in the store, which has {','.join(map(str, stored.boundaries))}. "
            "Train on those, or extract again with other --boundaries."
        )
    return chosen
