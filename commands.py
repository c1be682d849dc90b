"""Commands: settings from options and run file, one function that is called, and a summary that is printed.

Nothing is imported for a command before it is called or its own help is asked for.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from .config import RunConfig

_PACKAGE = __name__.rpartition(".")[0]

AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object as the last line of stdout.")]
RunFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Run file (YAML) with the same keys; options override it."),
]


@runtime_checkable
class Shown(Protocol):
    """A summary that is printed for people otherwise than as JSON."""

    def shown(self) -> Mapping[str, Any]:
        """Return the lines to print."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """What one command reads, runs and prints; functions and classes are named as ``module:name`` of this package."""

    settings: str
    """Class derived from RunConfig."""
    run: str
    """Function that is given the settings and returns a dataclass or mapping to print."""
    help: str
    _: dataclasses.KW_ONLY
    check: str | None = None
    """Function that is given settings and summary once that is printed, and raises SpecxError for exit code 1."""
    instead: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """More flags: name -> a function to run instead of ``run``, and the flag's help."""
    importing: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context in which the module of the function is imported."""

    def build(self) -> TyperCommand:
        """Return the command with the options of its settings class."""
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(help=self.help)(from_settings(_named(self.settings), self))
        command = typer.main.get_command(app)
        assert isinstance(command, TyperCommand)
        return command


class LazyCommand(TyperCommand):
    """A command that a list of commands shows by name and help alone; its callback builds the one that is called."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Build the command and return its context."""
        assert self.callback is not None
        return self.callback().make_context(*args, **kwargs)


def command_group(help_text: str, commands: Mapping[str, Command]) -> typer.Typer:
    """Return a group of commands without importing anything for them."""
    group = typer.Typer(help=help_text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    for name, command in commands.items():
        group.command(name, cls=LazyCommand, help=command.help)(command.build)
    return group


def from_settings(kind: "type[RunConfig]", command: Command) -> Callable[..., None]:
    """Return a function for typer that has an option for every key of a settings class, and runs a command.

    An option that is not given does not reach the settings, so the run file, presets and defaults decide.
    """
    from .config import keys_of, load_config
    from .options import is_given, option_of, parsed

    keys = keys_of(kind)

    def call(*, config: Path | None, as_json: bool, **given: Any) -> None:
        flags = [name for name in command.instead if given.pop(name)]
        run = command.instead[flags[0]][0] if flags else command.run
        options = {name: parsed(keys[name], value) for name, value in given.items() if is_given(value)}
        settings = load_config(kind, config, options)
        with command.importing():
            function = _named(run)
        summary = function(settings)
        show(summary, as_json)
        if command.check is not None:
            _named(command.check)(settings, summary)

    parameters = [
        *(_parameter(name, option_of(key), None) for name, key in keys.items()),
        *(
            _parameter(name, Annotated[bool, typer.Option(f"--{name.replace('_', '-')}", metavar="", help=text)], False)
            for name, (_, text) in command.instead.items()
        ),
        _parameter("config", RunFile, None),
        _parameter("as_json", AsJson, False),
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {}
    return call


def show(summary: Any, as_json: bool) -> None:
    """Print a summary as aligned lines, rows as a table, or as one JSON object on the last line."""
    if isinstance(summary, Shown) and not as_json:
        values = summary.shown()
    else:
        values = summary if isinstance(summary, Mapping) else dataclasses.asdict(summary)
    if as_json:
        print(json.dumps(values))
        return
    width = max(map(len, values))
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            print(f"{key}\n{_aligned(value)}")
        else:
            print(f"{key:<{width}}  {value}")


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"{_PACKAGE}.{module}"), attribute)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _aligned(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same keys as a table."""
    lines = [list(rows[0]), *(["-" if cell is None else str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
