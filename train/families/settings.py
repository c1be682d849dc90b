"""Settings of a draft family: base of the union that ``method`` discriminates. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from ...config import RunConfig


class FamilySettings(RunConfig):
    """Keys of every family. A family's own class narrows ``method`` to its name and adds its keys, and no others."""

    panel: ClassVar[str] = "Draft"

    method: str
    """Draft family to train; by default that of --preset, or eagle3."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the draft's MLP; by default the target's, or 6 times the hidden size of a Mixture-of-Experts target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyEntry:
    """A registry line: all of a family that can be known without torch."""

    settings: type[FamilySettings]
    presets: Mapping[str, Mapping[str, Any]]
    """Recipes by name: defaults for settings of the family and of the run."""
    implementation: str
    """``module:object`` of the ``DraftFamily``, imported when a draft is built."""
    default_preset: str | None = None
    """Preset of a run that names only the method; None is the defaults of the settings."""

    @property
    def method(self) -> str:
        """Name of the family."""
        return str(self.settings.model_fields["method"].default)
