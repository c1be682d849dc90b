"""A run's settings: the YAML run file, overridden by the command line's options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from . import SpecxError


class ConfigError(SpecxError):
    """A setting is unknown, missing or out of range."""


class RunConfig(BaseModel):
    """Base of every command's settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    @classmethod
    def keys(cls, settings: Mapping[str, Any]) -> list[str]:
        """Return the keys that there are, given the settings that were read."""
        return sorted(cls.model_fields)


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def load_config(kind: type[ConfigT], path: Path | None, options: Mapping[str, Any]) -> ConfigT:
    """Return the settings of one run; options that are None were not given on the command line.

    Raises ConfigError, which names the key, if a setting is unknown, missing or out of range.
    """
    settings = _read(path) if path else {}
    settings |= {key: value for key, value in options.items() if value is not None}
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key, what = _key(first), first["msg"]
        where = str(path) if path and key and key not in options else "options"
        if first["type"] == "extra_forbidden":
            what = f"unknown key; the keys are {', '.join(kind.keys(settings))}"
        elif first["type"] == "missing":
            what = f"missing; give --{key.replace('_', '-')} or the key in a run file"
        raise ConfigError(f"{where}: {key or kind.__name__}: {what}") from error


def _key(error: ErrorDetails) -> str:
    """Return the flat key that an error is about: one of a union's member too is written without the union's name."""
    if error["type"] == "union_tag_invalid":
        return str(error["ctx"]["discriminator"]).strip("'")
    names = [part for part in error["loc"] if isinstance(part, str)]
    return names[-1] if names else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(settings).__name__}")
    return settings
