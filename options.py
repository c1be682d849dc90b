"""What commands share: options of the same meaning, and how a summary is printed."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from .storage.codec_names import CodecName

CODECS = ", ".join(get_args(CodecName))
TokensPerPart = Annotated[int, typer.Option(help="Tokens committed at once.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
RunFile = Annotated[Path | None, typer.Option("--config", help="Run file, YAML; options override it.")]
StorePath = Annotated[str, typer.Argument(help="Feature store.")]


def integers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Parse integers with commas between them; anything else is wrong usage."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: expected integers such as 2,12,21", param_hint=option) from error


def show(summary: Any, as_json: bool) -> None:
    """Print a summary as aligned lines, rows as a table, or as one JSON object on the last line."""
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


def _aligned(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same keys as a table."""
    lines = [list(rows[0]), *(["-" if cell is None else str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
