"""Charts as plotly takes them, without colours: the page gives each trace its colour, dark or light."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

_LONGEST_LABEL = 28


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis of a chart."""

    title: str
    """With the unit."""
    kind: Literal["linear", "log", "category"] = "linear"
    format: str = ""
    """d3's, such as ``.0%``."""
    starts_at_zero: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One line, or one set of bars."""

    name: str
    x: Sequence[Any]
    y: Sequence[Any]
    kind: Literal["line", "points", "bars", "rows"] = "line"
    """points are marked and joined; rows are bars that lie"""
    colour: int = 0
    """Which of the page's colours."""
    is_faint: bool = False
    """Behind another that is what one should look at."""
    is_dashed: bool = False

    def plotly(self) -> dict[str, Any]:
        """Return plotly's trace; ``meta`` tells the page its colour."""
        meta = {"colour": self.colour, "faint": self.is_faint}
        named = {"name": shown(self.name), "meta": meta}
        if self.kind in ("bars", "rows"):
            orientation = "h" if self.kind == "rows" else "v"
            return named | {"type": "bar", "x": list(self.x), "y": list(self.y), "orientation": orientation}
        line = {"width": 1.2 if self.is_faint else 2, "dash": "dot" if self.is_dashed else "solid"}
        mode = "lines+markers" if self.kind == "points" else "lines"
        return named | {"type": "scatter", "mode": mode, "x": list(self.x), "y": list(self.y), "line": line}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A picture with its title and what to know about it."""

    title: str
    x: Axis
    y: Axis
    traces: Sequence[Trace]
    note: str = ""

    def plotly(self) -> dict[str, Any]:
        """Return plotly's figure."""
        rows = sum(len(trace.y) for trace in self.traces if trace.kind == "rows")
        has_legend = len(self.traces) > 1
        lines = -(-sum(len(trace.name) + 6 for trace in self.traces) // 44) if has_legend else 0
        layout: dict[str, Any] = {
            "xaxis": _axis(self.x, [value for trace in self.traces for value in trace.x]),
            "yaxis": _axis(self.y, [value for trace in self.traces for value in trace.y]),
            "showlegend": has_legend,
            "barmode": "group",
            "height": max(300, 90 + 26 * rows) + 22 * lines,
        }
        if rows:
            # From the top down, as in a table.
            layout["yaxis"]["autorange"] = "reversed"
        return {"data": [trace.plotly() for trace in self.traces], "layout": layout}


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One heading of the page and what stands under it."""

    title: str
    lead: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)
    """Numbers that matter, by their label."""
    table: Sequence[Sequence[str]] = ()
    """Rows, the first of them the header."""
    charts: Sequence[Chart] = ()


def _axis(axis: Axis, values: Sequence[Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"title": {"text": axis.title}, "type": axis.kind}
    if axis.format:
        described["tickformat"] = axis.format
    if axis.starts_at_zero:
        described["rangemode"] = "tozero"
    if axis.kind == "log":
        ticks = _log_ticks([value for value in values if value > 0])
        described |= {"tickvals": ticks, "ticktext": [count(tick) for tick in ticks]}
    return described


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Return powers of ten around some values, with 2 and 5 between them where there is room."""
    if not values:
        return []
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    digits = (1, 2, 5) if last - first <= 3 else (1,)
    return [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in digits]


def short_name(path: str) -> str:
    """Return what a directory is called, and a URL whole."""
    return path if "://" in path else Path(path).absolute().name


def shown(name: str) -> str:
    """Return a name from the data as it may stand in a chart: plotly reads tags in its texts."""
    short = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
    return html.escape(short, quote=False) or "(none)"


def count(number: float) -> str:
    """Return a number with three digits that matter, as 12.3 M."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}" if number % 1 else str(int(number))
