"""The study's results as tables in Markdown and as a plot.

Acceptance lengths are compared within a bucket and a seed: buckets are other texts, and a seed has the same first
weights and order of the data for every rope.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
COLOURS = {"yarn-truncated": "#0072b2", "plain-150000": "#d55e00", "plain-10000": "#009e73"}
_DASHES = ("solid", "dashed", "dotted")
_SPREAD = 0.06
"""Of a bucket's width, between lines, so that whiskers do not hide each other."""


def plot(results: Results, path: Path) -> None:
    """Write an SVG: a panel for each length, in it the differences from the baseline by context.

    Colours are ropes, dashes are ways to use them.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lengths, buckets = results["settings"]["lengths"], list(results["texts"])
    ways = [(way, dashes) for ways, dashes in zip(PLOTTED.values(), _DASHES, strict=True) for way in ways]
    figure = Figure(figsize=(7.2, 3.6 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), sharey=True, squeeze=False)[:, 0]
    for length, axes in zip(lengths, panels, strict=True):
        axes.axhline(0, color="black", linewidth=1)
        for number, (way, dashes) in enumerate(ways):
            found = differences(results, length, way, BASELINE)
            means, least, most = zip(*(found[bucket] for bucket in buckets), strict=True)
            shift = _SPREAD * (number - (len(ways) - 1) / 2)
            axes.errorbar(
                [place + shift for place in range(len(buckets))],
                means,
                yerr=[
                    [mean - low for mean, low in zip(means, least, strict=True)],
                    [high - mean for mean, high in zip(means, most, strict=True)],
                ],
                color=COLOURS[next(rope for rope in way if rope in COLOURS)],
                linestyle=dashes,
                marker="o",
                markersize=4,
            )
        axes.set_title(f"Trained at {length} tokens", loc="left")
        axes.set_xticks(range(len(buckets)), buckets)
        axes.set_ylabel("against the target's rope, %")
        axes.grid(axis="y", alpha=0.3)
    panels[-1].set_xlabel("context, tokens")
    keys = [Line2D([], [], color=colour, marker="o", label=NAMES[rope]) for rope, colour in COLOURS.items()]
    keys += [
        Line2D([], [], color="black", linestyle=dashes, label=label)
        for label, dashes in zip(PLOTTED, _DASHES, strict=True)
    ]
    figure.legend(handles=keys, loc="outside lower left", ncols=2, frameon=False)
    # The same file for the same results.
    with mpl.rc_context({"svg.hashsalt": "specx"}):
        figure.savefig(path, metadata={"Date": None})
