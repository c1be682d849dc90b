"""The section of a feature store."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..storage.ops.info import summary
from ..storage.reader import FeatureReader
from ..storage.store import FeatureStore
from .charts import Axis, Chart, Section, Trace, count, short_name, shown
from .errors import ReportError
from .sample import POSITION_EDGES, Coverage, Measured, coverage, measure

_BARS = 12
"""Categories that have a bar of their own."""
_POINTS = 200
"""Of a line, at most."""


def store_section(store: FeatureStore) -> Section:
    """Measure a store and draw it; raise ReportError if nothing is in it."""
    facts, reader = summary(store), FeatureReader(store)
    if not len(reader.catalogue):
        raise ReportError(f"{store.root}: the store has no sequences. Fill it by `specx extract`.")
    measured, covered = measure(reader), coverage(reader)
    return Section(
        title=f"Store {short_name(store.root)}",
        lead=f"{facts['target']['architecture']} run in {facts['compute_dtype']}, codec {facts['codec']}",
        figures={
            "Sequences": count(facts["sequences"]),
            "Tokens": count(facts["tokens"]),
            "Bytes": f"{count(facts['bytes'])}B".replace("kB", "KB"),
            "Bytes per token": f"{facts['bytes_per_token']:,.0f}",
            "Rejected rows": count(facts["rejected"]),
            "Boundaries": ", ".join(map(str, facts["boundaries"])),
        },
        charts=[
            _lengths(reader),
            _categories(reader),
            _norms(measured),
            _bytes(facts),
            _mass(measured),
            _coverage(covered),
        ],
    )


def _lengths(reader: FeatureReader) -> Chart:
    lengths = reader.catalogue.length
    edges = np.histogram_bin_edges(lengths, bins=min(40, max(8, int(len(lengths) ** 0.5))))
    counts, _ = np.histogram(lengths, edges)
    middle, longest = int(np.median(lengths)), int(lengths.max())
    return Chart(
        title="Lengths of sequences",
        note=f"Half of them have at most {middle:,} tokens, the longest {longest:,}.",
        x=Axis(title="tokens", starts_at_zero=True),
        y=Axis(title="sequences"),
        traces=[Trace(name="sequences", x=((edges[1:] + edges[:-1]) / 2).tolist(), y=counts.tolist(), kind="bars")],
    )


def _categories(reader: FeatureReader) -> Chart:
    tokens: Counter[str] = Counter()
    for category, length in zip(reader.catalogue.category, reader.catalogue.length, strict=True):
        tokens[str(category) or "(none)"] += int(length)
    ordered = tokens.most_common()
    shares = dict(ordered[:_BARS])
    if rest := ordered[_BARS:]:
        shares[f"{len(rest)} others"] = sum(size for _, size in rest)
    total = max(sum(shares.values()), 1)
    return _rows(
        "Categories", "By the tokens in them.", shares, total, Axis(title="share of the store's tokens", format=".0%")
    )


def _bytes(facts: Mapping[str, Any]) -> Chart:
    return _rows(
        "Bytes by array",
        f"{facts['bytes_per_token']:,.0f} bytes a token, as stored.",
        facts["bytes_by_array"],
        facts["tokens"],
        Axis(title="bytes a token"),
    )


def _rows(title: str, note: str, sizes: Mapping[str, int], total: int, axis: Axis) -> Chart:
    bars = Trace(
        name=axis.title, x=[size / total for size in sizes.values()], y=[shown(name) for name in sizes], kind="rows"
    )
    return Chart(title=title, note=note, x=axis, y=Axis(title="", kind="category"), traces=[bars])


def _norms(measured: Measured) -> Chart:
    ends = [*POSITION_EDGES[1:], 0]
    known = np.isfinite(next(iter(measured.rms.values())))
    labels = [_bucket(start, end) for start, end in zip(POSITION_EDGES, ends, strict=True)]
    return Chart(
        title="Size of hidden states by position",
        note=f"Root mean square of an entry, of {measured.tokens:,} tokens of {measured.sequences} sequences.",
        x=Axis(title="position in the sequence", kind="category"),
        y=Axis(title="root mean square", kind="log"),
        traces=[
            Trace(
                name=name,
                x=[label for label, there in zip(labels, known, strict=True) if there],
                y=[round(float(value), 5) for value in values[known]],
                kind="points",
                colour=colour,
            )
            for colour, (name, values) in enumerate(measured.rms.items())
        ],
    )


def _bucket(start: int, end: int) -> str:
    if end == start + 1:
        return str(start)
    return f"{_short(start)}-{_short(end - 1)}" if end else f"{_short(start)}-"


def _short(position: int) -> str:
    return f"{round(position / 1024)}k" if position >= 1024 else str(position)


def _mass(measured: Measured) -> Chart:
    k = np.arange(1, len(measured.mass) + 1)
    return Chart(
        title="Probability held by the top k",
        note=f"All {len(k)} stored logits hold {measured.mass[-1]:.2%} on average.",
        x=Axis(title="k, logits kept per token", kind="log"),
        y=Axis(title="probability", format=".0%"),
        traces=[
            Trace(name="mean", x=k.tolist(), y=_rounded(measured.mass)),
            Trace(name="lowest tenth of the tokens", x=k.tolist(), y=_rounded(measured.low_mass), is_dashed=True),
        ],
    )


def _coverage(covered: Coverage) -> Chart:
    V = len(covered.share)
    sizes = np.unique(np.geomspace(1, V, _POINTS).round().astype(np.int64))
    enough = int(np.searchsorted(covered.share, 0.99) + 1)
    what = "all" if covered.is_whole else "a sample of"
    return Chart(
        title="Coverage by a draft vocabulary",
        note=f"Of the most frequent tokens; {what} the store's supervised tokens, {covered.tokens:,}, are counted. "
        f"{enough:,} tokens cover 99 %.",
        x=Axis(title="tokens in the draft vocabulary", kind="log"),
        y=Axis(title="supervised tokens covered", format=".0%", starts_at_zero=True),
        traces=[Trace(name="covered", x=sizes.tolist(), y=_rounded(covered.share[sizes - 1]))],
    )


def _rounded(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    return [round(float(value), 5) for value in values]
