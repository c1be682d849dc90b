"""Command-line options made from the fields of settings classes."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

if TYPE_CHECKING:
    from .config import Key

_NUMBERS = {int: "integers such as 2,12,21", float: "numbers such as 0.9,0.95"}
_PLACEHOLDERS = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH"}
_PLACEHOLDER_WIDTH = 16
"""A longer one would leave no space for names and help in a terminal of 80 columns."""


def option_of(key: "Key") -> Any:
    """Return the annotation that makes typer take a key as an option or argument."""
    declared = key.option
    kind, metavar, choices = _option_type(key)
    metavar = declared.metavar or metavar
    listed = f"One of {', '.join(choices)}." if choices else ""
    text = " ".join(filter(None, [_help(key), listed, _default(key)]))
    if declared.is_argument:
        argument = typer.Argument(help=text, metavar=metavar or key.flag, show_default=False)
        return Annotated[kind | None, argument]
    flag = f"{key.flag}/--no-{key.flag.removeprefix('--')}" if kind is bool else key.flag
    option = typer.Option(flag, help=text, metavar=metavar, show_default=False, rich_help_panel=key.panel)
    return Annotated[kind | None, option]


def is_given(value: Any) -> bool:
    """Return whether an option is on the command line: typer has None for one that is not, or an empty list."""
    return value is not None and value != []


def parsed(key: "Key", value: Any) -> Any:
    """Return what an option was given as a setting; raises typer.BadParameter, exit code 2, for wrong usage."""
    kinds = _kinds(key)
    if not isinstance(value, list):
        return value
    if dict in map(_origin, kinds):
        if any("=" in each for each in value):
            return _mapping(key, value)
        if len(kinds) > 1 and len(value) == 1:
            return value[0]
        raise typer.BadParameter(f"{value[0]!r}: expected KEY=VALUE", param_hint=key.flag)
    number = _number(kinds[0])
    if number is None:
        return tuple(value)
    try:
        return tuple(number(part) for each in value for part in each.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{','.join(value)!r}: expected {_NUMBERS[number]}", param_hint=key.flag) from error


def _option_type(key: "Key") -> tuple[Any, str, tuple[str, ...]]:
    """Return the type that typer parses a key as, a list where it is repeated, its placeholder, and its choices.

    Choices are there only if they are too long to be the placeholder.
    """
    if key.option.is_text:
        return str, "TEXT", ()
    kinds = _kinds(key)
    words = tuple(dict.fromkeys(str(value) for kind in kinds for value in _choices(kind)))
    if dict in map(_origin, kinds):
        return list[str], "KEY=VALUE", words
    is_short = len("|".join(words)) <= _PLACEHOLDER_WIDTH
    placeholder = "|".join(words) if is_short else "NAME"
    choices = () if is_short else words
    if all(get_origin(kind) is Literal for kind in kinds):
        return Literal[words], placeholder, choices
    if len(kinds) == 1 and get_origin(kinds[0]) is tuple:
        return list[str], "N,..." if _number(kinds[0]) is not None else placeholder or "TEXT", choices
    if len(kinds) == 1 and kinds[0] in _PLACEHOLDERS:
        return kinds[0], _PLACEHOLDERS[kinds[0]], ()
    if all(get_origin(kind) is Literal or kind in _PLACEHOLDERS for kind in kinds):
        # Models of a union differ in the type; the one that is chosen parses it.
        return str, "TEXT", ()
    raise TypeError(f"{key.name}: no option can be made of {kinds}; give the field an Option(is_text=True)")


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return the values of a Literal, or of the Literal that a tuple holds."""
    if get_origin(kind) is tuple:
        return tuple(value for each in _plain(get_args(kind)[0]) for value in _choices(each))
    return get_args(kind) if get_origin(kind) is Literal else ()


def _kinds(key: "Key") -> list[Any]:
    """Return the types a key may have, None left out."""
    found: list[Any] = []
    for info in key.fields.values():
        found += [kind for kind in _plain(info.annotation) if kind not in found]
    return found


def _plain(annotation: Any) -> list[Any]:
    """Return the types of a union, without None and without metadata."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for each in get_args(annotation) for kind in _plain(each)]
    return [] if annotation in (None, NoneType) else [annotation]


def _origin(kind: Any) -> Any:
    return get_origin(kind) or kind


def _number(kind: Any) -> type[int] | type[float] | None:
    """Return int or float if a type is a tuple of such."""
    elements = {each for item in get_args(kind) if item is not ... for each in _plain(item)}
    if get_origin(kind) is not tuple or not elements <= {int, float}:
        return None
    return float if float in elements else int


def _mapping(key: "Key", texts: Sequence[str]) -> dict[str, Any]:
    """Parse KEY=VALUE, several with commas between them; a value is YAML."""
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        for pair in re.split(r",(?=[\w.-]+=)", text):
            name, separator, value = pair.partition("=")
            if not separator or not name.strip():
                raise typer.BadParameter(f"{pair!r}: expected KEY=VALUE", param_hint=key.flag)
            try:
                found[name.strip()] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                message = f"{pair!r}: the value is not YAML: {' '.join(str(error).split())}"
                raise typer.BadParameter(message, param_hint=key.flag) from error
    return found


def _help(key: "Key") -> str:
    """Return the docstring of a field; where models of a union differ, that of each."""
    texts = dict.fromkeys(" ".join((info.description or "").split()) for info in key.fields.values())
    # typer would take a word in brackets for markup.
    return re.sub(r"\[(?=[a-z/#@])", r"\\[", " ".join(texts).replace("``", "`"))


def _default(key: "Key") -> str:
    """Return the default of a key in words, by model where models of a union differ."""
    if all(info.is_required() for info in key.fields.values()):
        return "(required)"
    shown = {
        tag: _text(None if info.is_required() else info.get_default(call_default_factory=False))
        for tag, info in key.fields.items()
    }
    if all(text == tag for tag, text in shown.items()):
        # The discriminator.
        return ""
    if len(set(shown.values())) > 1:
        return f"(default: {', '.join(f'{text} for {tag}' for tag, text in shown.items() if text)})"
    text = next(iter(shown.values()))
    return f"(default: {text})" if text else ""


def _text(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | tuple):
        return ",".join(map(str, default))
    return "" if default is None or isinstance(default, dict) else str(default)
