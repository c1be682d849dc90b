"""Settings of ``specx train``: those of the run, and those of the draft family that ``method`` names."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, Union

from pydantic import Field, model_validator

from .families.registry import FAMILIES, entries, preset, preset_names
from .families.settings import FamilySettings
from .settings import DataSettings, LoopSettings, OptimizerSettings

if TYPE_CHECKING:
    AnyFamilySettings = FamilySettings
else:
    # Also of the families that installed packages add, which no type checker knows.
    AnyFamilySettings = Annotated[
        Union[tuple(entry.settings for entry in entries().values())],  # noqa: UP007
        Field(discriminator="method"),
    ]


class RecipeSettings(DataSettings, OptimizerSettings, LoopSettings):
    """All settings of a run but the draft's."""

    panel: ClassVar[str] = "Draft"

    preset: str | None = Field(
        default=None,
        description=f"Recipe: defaults by name, overridden by what is given. One of {', '.join(preset_names())}.",
    )
    init_from: str | None = None
    """Exported draft to start from; the draft vocabulary is that draft's."""


class TrainConfig(RecipeSettings):
    """What to train, on what, and how.

    Keys are flat wherever users write them: in run files, options and ``TrainConfig(method="eagle3", ttt_steps=7)``.
    Those of the family, a pydantic union discriminated by ``method``, are kept together in ``draft``.
    """

    draft: AnyFamilySettings = Field(default_factory=lambda: FAMILIES[0].settings.model_validate({}))
    """Settings of the draft family."""

    @property
    def method(self) -> str:
        """Name of the draft family."""
        return self.draft.method

    @classmethod
    def keys(cls, settings: Mapping[str, Any]) -> list[str]:
        """Return the keys that a run may have, given the settings that name its method."""
        entry = entries().get(_method(settings))
        of_family = entry.settings.model_fields if entry else {"method": None}
        return sorted({*RecipeSettings.model_fields, *of_family})

    def flat(self) -> dict[str, Any]:
        """Return all settings as plain JSON values under the keys that users write."""
        values: dict[str, Any] = self.model_dump(mode="json")
        draft: dict[str, Any] = values.pop("draft")
        return values | draft

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        """Lay what is given over the preset's values, and move the family's keys into ``draft``."""
        if not isinstance(values, Mapping):
            return values
        given = dict(values)
        draft = given.pop("draft", None)
        if isinstance(draft, FamilySettings):
            # The keys that were set, and no defaults: a preset comes beneath them.
            draft = draft.model_dump(exclude_unset=True) | {"method": draft.method}
        given = {**(draft or {}), **given}
        method = _method(given)
        given = _preset_values(given, method) | given
        known = entries().get(method)
        own = known.settings.model_fields if known else {}
        family = {key: given.pop(key) for key in list(given) if key in own or key == "method"}
        return given | {"draft": family | {"method": method}}

    @model_validator(mode="after")
    def _a_weight_a_store(self) -> Self:
        if self.weights and len(self.weights) != len(self.store):
            raise ValueError(f"{len(self.weights)} weights of {len(self.store)} stores; give one a store, or none")
        return self


def _method(settings: Mapping[str, Any]) -> str:
    """Return the method that flat settings name, by themselves or by their preset."""
    if settings.get("method"):
        return str(settings["method"])
    named = preset(str(settings["preset"])) if settings.get("preset") else None
    return named[0] if named else FAMILIES[0].method


def _preset_values(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return the settings of the preset that flat settings name, or of the method's own. Raises ValueError."""
    name = settings.get("preset")
    if name is None:
        entry = entries().get(method)
        name = entry.default_preset if entry else None
        if name is None:
            return {}
    found = preset(str(name))
    if found is None:
        raise ValueError(f"preset {name}: no such recipe, expected one of {', '.join(preset_names())}")
    if found[0] != method:
        raise ValueError(f"preset {name} is a recipe of method {found[0]}, not of {method}; leave one of them out")
    return found[1]
