"""Draft families by name: the built-in ones, and those that installed packages add.

A package adds a family by an entry point of the group ``specx.draft_families`` that names a ``FamilyEntry``. Nothing
here imports torch: the command line needs the settings, and an implementation is imported when it is asked for.
"""

from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from ..errors import TrainError
from .eagle1.settings import EAGLE1
from .eagle3.settings import EAGLE3
from .settings import FamilyEntry

if TYPE_CHECKING:
    from .base import DraftFamily

FAMILIES = (EAGLE3, EAGLE1)
"""Built-in families; the first is the default method."""

ENTRY_POINTS = "specx.draft_families"


@cache
def entries() -> dict[str, FamilyEntry]:
    """Return every family by its method. Raises TrainError for an entry point that is none, or a name twice."""
    found = {entry.method: entry for entry in FAMILIES}
    for point in entry_points(group=ENTRY_POINTS):
        try:
            entry = point.load()
        except (ImportError, AttributeError) as error:
            raise TrainError(
                f"entry point {point.name} = {point.value} of {ENTRY_POINTS}: cannot be imported ({error}). Update or "
                "uninstall the package that brings it."
            ) from error
        if not isinstance(entry, FamilyEntry) or entry.method in found:
            what = "taken" if isinstance(entry, FamilyEntry) else f"a {type(entry).__name__}, expected a FamilyEntry"
            raise TrainError(
                f"entry point {point.name} = {point.value} of {ENTRY_POINTS}: it is {what}. Uninstall the package "
                "that brings it."
            )
        found[entry.method] = entry
    return found


@cache
def family(method: str) -> "DraftFamily[Any, Any, Any]":
    """Return the implementation of a family; imports torch. Raises TrainError for an unknown method."""
    known = entries()
    if method not in known:
        raise TrainError(f"method {method}: no such draft family, expected one of {', '.join(known)}.")
    found: DraftFamily[Any, Any, Any] = resolve_name(known[method].implementation)
    return found


def families() -> "dict[str, DraftFamily[Any, Any, Any]]":
    """Return the implementations of all families by method; imports torch."""
    return {method: family(method) for method in entries()}


def preset(name: str) -> tuple[str, dict[str, Any]] | None:
    """Return method and settings of a preset, or None if no family has one of that name."""
    for method, entry in entries().items():
        if name in entry.presets:
            return method, dict(entry.presets[name])
    return None


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return [name for entry in entries().values() for name in entry.presets]
