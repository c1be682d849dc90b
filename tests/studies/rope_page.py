"""The study's results as tables in Markdown and as a plot.

Acceptance lengths are compared within a bucket and a seed: buckets are other texts, and a seed has the same first
weights and order of the data for every rope.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

Results = Mapping[str, Any]
Way = tuple[str, str]
"""The rope that drafts were trained with, and the one that they are served with."""
Cell = tuple[float, float, float]
"""Mean, least and largest of the seeds."""

BASELINE: Way = ("yarn", "yarn")
"""Trained and served with the target's own block."""

NAMES = {
    "yarn": "YaRN, truncate false",
    "yarn-truncated": "YaRN, truncate true",
    "plain-150000": "plain, theta 150000",
    "plain-10000": "plain, theta 10000",
    "yarn-unscaled": "the target's angles, factor 1",
}
SERVED_BY_TARGET = [("yarn-truncated", "yarn"), ("plain-150000", "yarn"), ("plain-10000", "yarn")]
AS_TRAINED = [(rope, rope) for rope in ("yarn", "yarn-truncated", "plain-150000", "plain-10000")]
CONTROLS = [
    ("plain-150000", "yarn-unscaled"),
    ("plain-10000", "yarn-unscaled"),
    ("yarn", "yarn-truncated"),
    ("yarn", "plain-150000"),
    ("yarn", "plain-10000"),
]


def lengths_of(results: Results, length: int, trained: str, served: str) -> list[dict[str, float]]:
    """Return the acceptance lengths by bucket, and of ``all``, of each seed in order."""
    found = [
        row for row in results["rows"] if (row["length"], row["trained"], row["served"]) == (length, trained, served)
    ]
    return [
        row["by_context"] | {"all": row["acceptance_length"]} for row in sorted(found, key=lambda row: int(row["seed"]))
    ]


def differences(results: Results, length: int, way: Way, base: Way) -> dict[str, Cell]:
    """Return by bucket the difference of ``way`` from ``base`` in percent, each seed against the same seed."""
    found, other = lengths_of(results, length, *way), lengths_of(results, length, *base)
    assert len(found) == len(other)
    return {
        bucket: _cell([100 * (ours[bucket] / theirs[bucket] - 1) for ours, theirs in zip(found, other, strict=True)])
        for bucket in found[0]
    }


def tables(results: Results) -> str:
    """Return all tables in Markdown."""
    buckets = [*results["texts"], "all"]
    lengths = results["settings"]["lengths"]
    otherwise = SERVED_BY_TARGET + CONTROLS
    found = {
        "Acceptance length, mean of the seeds ± standard deviation": _rows(
            buckets, {(at, way): _absolute(results, at, way) for at in lengths for way in AS_TRAINED + SERVED_BY_TARGET}
        ),
        "As trained, percent against the target's rope: mean (least to largest of the seeds)": _rows(
            buckets, {(at, way): _relative(results, at, way, BASELINE) for at in lengths for way in AS_TRAINED[1:]}
        ),
        "Served otherwise, percent against the same draft as trained": _rows(
            buckets,
            {(at, way): _relative(results, at, way, (way[0], way[0])) for at in lengths for way in otherwise},
        ),
        "In vLLM and by the estimate": _checks(results, buckets),
        "The text": _table(
            ["", *results["texts"]],
            [[key, *(each[key] for each in results["texts"].values())] for key in ("tokens", "repeated")],
        ),
        "Correlation of attention scores with those of the target's rope, by distance": _correlations(results),
    }
    return "\n".join(f"{title}\n\n{table}" for title, table in found.items())


def _rows(buckets: Sequence[str], cells: Mapping[tuple[int, Way], Mapping[str, str]]) -> str:
    rows = []
    for (length, (trained, served)), texts in cells.items():
        how = "as trained" if served == trained else NAMES[served]
        rows.append([length, NAMES[trained], how, *(texts[bucket] for bucket in buckets)])
    return _table(["trained at", "trained with", "served with", *buckets], rows)


def _correlations(results: Results) -> str:
    models = results["correlations"]
    distances = next(iter(next(iter(models.values())).values()))
    rows = [[model, NAMES[rope], *values.values()] for model, ropes in models.items() for rope, values in ropes.items()]
    return _table(["", "", *distances], rows)


def _absolute(results: Results, length: int, way: Way) -> dict[str, str]:
    found = lengths_of(results, length, *way)
    values = {bucket: [each[bucket] for each in found] for bucket in found[0]}
    return {bucket: f"{statistics.mean(each):.3f} ± {_deviation(each):.3f}" for bucket, each in values.items()}


def _relative(results: Results, length: int, way: Way, base: Way) -> dict[str, str]:
    cells = differences(results, length, way, base)
    return {bucket: f"{mean:+.1f} ({least:+.1f} to {most:+.1f})" for bucket, (mean, least, most) in cells.items()}


def _checks(results: Results, buckets: Sequence[str]) -> str:
    rows: list[list[Any]] = []
    for check in results["vllm"]:
        way = (check["length"], check["trained"], check["served"])
        engine = check["by_context"] | {"all": check["acceptance_length"]}
        counts = check["by_context_verifications"] | {"all": check["verifications"]}
        estimate = lengths_of(results, *way)[check["seed"]]
        name = f"{NAMES[check['trained']]}; " + ("as trained" if way[1] == way[2] else NAMES[check["served"]])
        rows.append([name, "vLLM", *(f"{engine[bucket]:.3f}" for bucket in buckets)])
        rows.append(["", "estimate", *(f"{estimate[bucket]:.3f}" for bucket in buckets)])
        rows.append(["", "verifications in vLLM", *(counts[bucket] for bucket in buckets)])
    return _table(["draft", "", *buckets], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _cell(values: Sequence[float]) -> Cell:
    return statistics.mean(values), min(values), max(values)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


PLOTTED = {
    "trained and served with it": AS_TRAINED[1:],
    "trained with it, served with the target's": SERVED_BY_TARGET,
    "trained with the target's, served with it": CONTROLS[2:],
}
WIDTH, PANEL, LEFT, RIGHT, TOP, BOTTOM, LEGEND = 720, 330, 64, 16, 46, 62, 116
"""Pixels: of the plot, of a panel's height, of what stands around its axes, and of the legend's height."""
COLOURS = {"yarn-truncated": "#0072b2", "plain-150000": "#d55e00", "plain-10000": "#009e73"}


def plot(results: Results) -> str:
    """Return an SVG: a panel for each length, in it the differences from the baseline by context."""
    ways = [way for ways in PLOTTED.values() for way in ways]
    lengths = results["settings"]["lengths"]
    cells = {(length, *way): differences(results, length, way, BASELINE) for length in lengths for way in ways}
    values = [value for each in cells.values() for cell in each.values() for value in cell]
    step = next(each for each in (0.5, 1, 2, 5, 10, 20) if (max(values) - min(values)) / each <= 8)
    low, high = step * (min(*values, 0) // step), step * -(-max(*values, 0) // step)
    height = len(lengths) * PANEL + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="15" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for number, length in enumerate(lengths):
        axes = _Axes(number * PANEL, low, high, list(results["texts"]))
        parts += axes.drawn(f"Trained at {length} tokens: acceptance length against the target's rope, %", step)
        for shift, way in enumerate(ways):
            parts += axes.line(cells[(length, *way)], way, 5 * (shift - (len(ways) - 1) / 2))
    return "\n".join([*parts, *_legend(len(lengths) * PANEL), "</svg>\n"])


def _legend(top: int) -> list[str]:
    """Colours are ropes, dashes are ways to use them."""
    parts = []
    for number, (rope, colour) in enumerate(COLOURS.items()):
        x = 24 + 230 * number
        parts.append(f'<circle cx="{x + 6}" cy="{top + 15}" r="6" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{top + 20}">{NAMES[rope]}</text>')
    for number, (label, ways) in enumerate(PLOTTED.items()):
        y = top + 48 + 24 * number
        parts.append(f'<path d="M24 {y - 5}h60" stroke="#222" {_line_style(ways[0])}/>')
        parts.append(f'<text x="96" y="{y}">{escape(label)}</text>')
    return parts


class _Axes:
    """One panel."""

    def __init__(self, top: int, low: float, high: float, buckets: list[str]) -> None:
        self._top, self._low, self._high, self._buckets = top, low, high, buckets

    def x(self, bucket: int) -> float:
        return LEFT + (bucket + 0.5) * (WIDTH - LEFT - RIGHT) / len(self._buckets)

    def y(self, value: float) -> float:
        share = (self._high - value) / (self._high - self._low)
        return self._top + TOP + share * (PANEL - TOP - BOTTOM)

    def drawn(self, title: str, step: float) -> list[str]:
        parts = [f'<text x="{LEFT - 40}" y="{self._top + 26}" font-weight="600">{escape(title)}</text>']
        for number in range(round((self._high - self._low) / step) + 1):
            value = self._low + number * step
            colour, y = "#222" if value == 0 else "#ddd", self.y(value)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{colour}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{value:+g}</text>')
        for number, bucket in enumerate(self._buckets):
            at = f'x="{self.x(number):.1f}" text-anchor="middle"'
            parts.append(f'<text {at} y="{self._top + PANEL - BOTTOM + 22}">{bucket}</text>')
        middle = (WIDTH + LEFT - RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{self._top + PANEL - BOTTOM + 44}" text-anchor="middle">context, tokens</text>'
        )
        return parts

    def line(self, cells: Mapping[str, Cell], way: Way, shift: float) -> list[str]:
        points = [(self.x(number) + shift, cells[bucket]) for number, bucket in enumerate(self._buckets)]
        path = " ".join(f"{x:.1f},{self.y(mean):.1f}" for x, (mean, _, _) in points)
        whiskers = "".join(f"M{x:.1f} {self.y(least):.1f}V{self.y(most):.1f}" for x, (_, least, most) in points)
        stroke = f'stroke="{COLOURS[_rope(way)]}"'
        return [
            f'<polyline points="{path}" fill="none" {stroke} {_line_style(way)}/>',
            f'<path d="{whiskers}" {stroke}/>',
            *(
                f'<circle cx="{x:.1f}" cy="{self.y(mean):.1f}" r="3.5" fill="{COLOURS[_rope(way)]}"/>'
                for x, (mean, _, _) in points
            ),
        ]


def _rope(way: Way) -> str:
    """Return the one that is not the target's."""
    return way[0] if way[0] != BASELINE[0] else way[1]


def _line_style(way: Way) -> str:
    kinds = {way[0] == way[1]: "", way[0] == BASELINE[0] != way[1]: ' stroke-dasharray="2 4"'}
    return 'stroke-width="2.5"' + kinds.get(True, ' stroke-dasharray="9 5"')
