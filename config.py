"""Base of all settings, and the YAML run file that command-line options override."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from . import SpecxError

OTHER_PANEL = "Options"
"""Panel of ``--help`` for keys whose class names none."""


class ConfigError(SpecxError):
    """A setting is unknown, missing or out of range."""


class RunConfig(BaseModel):
    """Base of every command's settings: frozen, and unknown keys are refused.

    The docstring of a field is the help of its option. A class may set ``panel``, the heading in ``--help`` of the
    fields it declares itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)

    panel: ClassVar[str] = OTHER_PANEL

    @classmethod
    def keys(cls, settings: Mapping[str, Any]) -> list[str]:
        """Return the keys that there are, given the settings that were read; an unknown key is answered with them."""
        return sorted(keys_of(cls))


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """Command-line form of a field where its key and type do not determine it; ``Annotated`` metadata."""

    name: str | None = None
    """Name without dashes; None is the key in kebab case."""
    is_argument: bool = False
    """Positional."""
    is_text: bool = False
    """Passed on as given, since a validator of the field parses it."""
    metavar: str | None = None
    """Placeholder of the value in ``--help``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of a settings class, as run files and options have it."""

    name: str
    panel: str
    fields: Mapping[str, FieldInfo]
    """By the discriminator's value in each model that has the key; one entry, "", for a field of the class itself."""

    @property
    def option(self) -> Option:
        """Metadata of the first field that has some."""
        found = (each for info in self.fields.values() for each in info.metadata if isinstance(each, Option))
        return next(found, Option())

    @property
    def flag(self) -> str:
        """Spelling on the command line, such as ``--batch-tokens``, or ``STORE`` for an argument."""
        if self.option.is_argument:
            return self.option.metavar or self.name.upper()
        return f"--{self.option.name or self.name.replace('_', '-')}"


def keys_of(kind: type[BaseModel]) -> dict[str, Key]:
    """Return the keys of a settings class by name, its own fields first, then those of its bases in order.

    A field that is a union of models, discriminated by one of their fields, is not a key itself: the fields of all its
    models are.
    """
    keys: dict[str, Key] = {}
    for name, panel in _declared(kind):
        info = kind.model_fields[name]
        members = _union_members(info)
        if not members:
            keys[name] = Key(name=name, panel=panel, fields={"": info})
            continue
        found: dict[str, dict[str, FieldInfo]] = {}
        for tag, model in members.items():
            for inner, member_info in model.model_fields.items():
                found.setdefault(inner, {})[tag] = member_info
        for inner, fields in found.items():
            tags = "" if len(fields) == len(members) else f": {', '.join(fields)}"
            keys[inner] = Key(name=inner, panel=f"{name.capitalize()}{tags}", fields=fields)
    return keys


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def load_config(kind: type[ConfigT], path: Path | None, options: Mapping[str, Any]) -> ConfigT:
    """Return the settings of one run; options that are None were not given on the command line.

    Raises ConfigError, which names the key and its option, if a setting is unknown, missing or out of range.
    """
    given = {key: value for key, value in options.items() if value is not None}
    settings = (_read(path) if path else {}) | given
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        name, below = _flat_location(kind, first["loc"])
        where = _source(kind, name, below, path, given)
        raise ConfigError(f"{where}: {_message(kind, name, first, settings)}") from error


def _declared(kind: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield name and panel of each field by the class that declares it, in method resolution order."""
    seen: set[str] = set()
    for base in kind.__mro__:
        for name in inspect.get_annotations(base):
            if name in kind.model_fields and name not in seen:
                seen.add(name)
                yield name, vars(base).get("panel", OTHER_PANEL)


def _union_members(info: FieldInfo) -> dict[str, type[BaseModel]]:
    """Return the models of a discriminated union by the discriminator's value; empty for any other field."""
    if not isinstance(info.discriminator, str):
        return {}
    models = [each for each in get_args(info.annotation) if isinstance(each, type) and issubclass(each, BaseModel)]
    return {str(tag): model for model in models for tag in get_args(model.model_fields[info.discriminator].annotation)}


def _source(
    kind: type[RunConfig], name: str | None, below: list[str], path: Path | None, given: Mapping[str, Any]
) -> str:
    """Return where a wrong value is from: options, with the option's name, or the run file; and its key."""
    if name is None:
        return " and ".join([*([str(path)] if path else []), *(["options"] if given or not path else [])])
    key = keys_of(kind).get(name)
    shown = ".".join([name, *below])
    if path is not None and name not in given:
        return f"{path}: {shown}"
    return f"options: {key.flag} ({shown})" if key else f"options: {shown}"


def _flat_location(kind: type[RunConfig], loc: tuple[int | str, ...]) -> tuple[str | None, list[str]]:
    """Return the key that an error is about, that of a union's model included, and what is below the key."""
    if loc and loc[0] in kind.model_fields:
        info = kind.model_fields[str(loc[0])]
        if members := _union_members(info):
            if len(loc) == 1:
                return str(info.discriminator), []
            if loc[1] in members:
                loc = loc[2:]
    if not loc:
        return None, []
    # Of a union of types pydantic also names the type, such as "dict[str,float]", which is no place.
    return str(loc[0]), [str(each) for each in loc[1:] if "[" not in str(each)]


def _message(kind: type[RunConfig], name: str | None, error: ErrorDetails, settings: Mapping[str, Any]) -> str:
    """Return what is wrong, and what to do where that is known."""
    keys = keys_of(kind)
    if error["type"] == "extra_forbidden" and name is not None:
        other = f"; {name} is a key of {', '.join(keys[name].fields)}" if name in keys else ""
        return f"unknown key; the keys are {', '.join(kind.keys(settings))}{other}"
    if error["type"] == "missing" and name in keys:
        return f"missing; give {keys[name].flag} or the key in a run file"
    return error["msg"].removeprefix("Value error, ")


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(settings).__name__}")
    return settings
