"""Settings and preset of EAGLE-1. No torch."""

from typing import Literal

from pydantic import Field

from ..settings import FamilyEntry, FamilySettings


class Eagle1Settings(FamilySettings):
    """EAGLE-1 (arXiv 2401.15077); EAGLE-2 is the same draft where the engine drafts a tree."""

    method: Literal["eagle1"] = "eagle1"
    """Draft family to train; by default that of --preset, or eagle3."""
    feature_noise: float = Field(default=0.0, ge=0)
    """Half-width a of uniform noise on the input features: U(-a, a) * 512 / T in a sequence of T tokens."""
    logit_loss_weight: float = Field(default=0.1, ge=0)
    """Weight of the cross-entropy beside the smooth L1 loss of the features."""


EAGLE1 = FamilyEntry(
    settings=Eagle1Settings,
    # arXiv 2401.15077 and its training code.
    presets={"eagle1": {"lr": 3e-5, "gradient_clip": 0.5, "feature_noise": 0.1}},
    implementation="specx.train.families.eagle1.family:FAMILY",
    default_preset="eagle1",
)
