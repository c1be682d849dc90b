"""From what each request did to the figures that are reported."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .generations import Generation, Pass, Tally, tally_of

CONTEXT_EDGES = (0, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Buckets of the context length at a verification, in tokens."""

ALL = "all"
"""The row of the table that is of every category together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSummary:
    """How a draft did, over all batch sizes. Acceptance length: tokens emitted per verification, bonus included."""

    acceptance_length: float
    per_position: list[float]
    """Share of the verifications that accepted the first, second, … drafted token; empty where it is not told."""
    by_category: dict[str, float]
    """Acceptance length; empty if the engine does not tell it of requests."""
    by_context: dict[str, float]
    """Acceptance length by context length at the verification, ``from-to`` in tokens; empty as by_category."""
    lossless: bool | None
    """Whether every output is the target's own, token for token; None where sampling and without a baseline."""
    tokens_per_s: float
    """At the first batch size."""
    baseline_tokens_per_s: float | None
    """The same engine, prompts and batch size without the draft."""
    requests: int
    """Turns decoded with the draft."""
    verifications: int
    left_out: int
    """Turns that were not asked, because the target had no room for them, over all batch sizes."""
    table: list[dict[str, Any]]
    """For each batch size and category: tokens a second without and with the draft, acceptance length, difference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One batch size: with the draft and without."""

    batch_size: int
    drafted: Pass
    baseline: Pass | None


def summarise(
    compared: Sequence[Compared],
    categories: Sequence[str],
    *,
    num_speculative_tokens: int,
    is_greedy: bool,
    turns: int | None = None,
) -> EvaluateSummary:
    """Compare passes with the draft to those without; ``categories`` are those of the prompts.

    ``turns`` are those of all prompts together, one each by default.
    """
    total = Tally()
    for each in compared:
        total.add(each.drafted.tally or Tally())
    drafted = [generation for each in compared for generation in each.drafted.generations]
    is_compared = all(each.baseline is not None for each in compared)
    first = compared[0]
    expected = (len(categories) if turns is None else turns) * len(compared)
    return EvaluateSummary(
        acceptance_length=round(total.length, 4),
        per_position=_shares(total, num_speculative_tokens),
        by_category={name: round(tally.length, 4) for name, tally in _by_category(drafted, categories).items()},
        by_context=by_context((each.prompt_length + 1, each.accepted) for each in drafted if each.accepted is not None),
        lossless=all(map(_is_same, compared)) if is_greedy and is_compared else None,
        tokens_per_s=round(first.drafted.tokens_per_s, 1),
        baseline_tokens_per_s=None if first.baseline is None else round(first.baseline.tokens_per_s, 1),
        requests=len(drafted),
        verifications=total.verifications,
        left_out=expected - len(drafted),
        table=[row for each in compared for row in _rows(each, categories)],
    )


def by_context(walks: Iterable[tuple[int, Sequence[int]]]) -> dict[str, float]:
    """Return acceptance lengths by context, given the context at the first verification and what each accepted."""
    buckets: dict[int, list[int]] = {}
    for context, accepted in walks:
        for count in accepted:
            buckets.setdefault(sum(edge <= context for edge in CONTEXT_EDGES) - 1, []).append(count)
            context += count + 1
    return {_bucket(index): round(tally_of(counts).length, 4) for index, counts in sorted(buckets.items())}


def _is_same(compared: Compared) -> bool:
    assert compared.baseline is not None
    ours, own = (
        [(each.prompt, each.turn, each.output_ids) for each in decoded.generations]
        for decoded in (compared.drafted, compared.baseline)
    )
    return ours == own


def _shares(tally: Tally, positions: int) -> list[float]:
    if tally.per_position is None:
        return []
    counts = tally.per_position + [0] * (positions - len(tally.per_position))
    return [round(count / max(tally.verifications, 1), 4) for count in counts]


def _by_category(generations: Iterable[Generation], categories: Sequence[str]) -> Mapping[str, Tally]:
    """Return the tallies, by name; none if there are requests without."""
    found: dict[str, Tally] = {}
    for each in generations:
        if each.tally is None:
            return {}
        found.setdefault(categories[each.prompt], Tally()).add(each.tally)
    return dict(sorted(found.items()))


def _rows(compared: Compared, categories: Sequence[str]) -> list[dict[str, Any]]:
    drafted, baseline = compared.drafted, compared.baseline
    tallies = _by_category(drafted.generations, categories)
    names = sorted(set(categories))
    rates = _rates(drafted, categories)
    own = None if baseline is None else _rates(baseline, categories)
    rows = []
    for name in [*(names if len(names) > 1 else []), ALL]:
        tally = drafted.tally if name == ALL else tallies.get(name)
        rate, alone = rates.get(name, 0.0), None if own is None else own.get(name, 0.0)
        rows.append(
            {
                "batch_size": compared.batch_size,
                "category": name,
                "requests": sum(name in (ALL, categories[each.prompt]) for each in drafted.generations),
                "baseline_tokens_per_s": None if alone is None else round(alone, 1),
                "tokens_per_s": round(rate, 1),
                "acceptance_length": None if tally is None else round(tally.length, 3),
                "delta_percent": round(100 * (rate / alone - 1), 1) if alone else None,
            }
        )
    return rows


def _rates(decoded: Pass, categories: Sequence[str]) -> dict[str, float]:
    """Return tokens a second by category, and of all.

    Categories run mixed. A category's rate is that of one of its requests, times how many of any ran at a time on
    average: what there would be if all that ran were of this category.
    """
    tokens: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for each in decoded.generations:
        name = categories[each.prompt]
        tokens[name] = tokens.get(name, 0) + len(each.output_ids)
        seconds[name] = seconds.get(name, 0.0) + each.seconds
    at_a_time = sum(seconds.values()) / max(decoded.seconds, 1e-9)
    rates = {name: at_a_time * tokens[name] / max(seconds[name], 1e-9) for name in tokens}
    return rates | {ALL: decoded.tokens_per_s}


def _bucket(index: int) -> str:
    upper = f"-{CONTEXT_EDGES[index + 1]}" if index + 1 < len(CONTEXT_EDGES) else "-"
    return f"{CONTEXT_EDGES[index]}{upper}"
