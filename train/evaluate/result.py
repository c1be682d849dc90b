"""From what each request did to the figures that are reported."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

CONTEXT_EDGES = (0, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Buckets of the context length at a verification, in tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What one engine did with one prompt."""

    prompt_length: int
    category: str
    output_ids: list[int]
    accepted: list[int]
    """Drafted tokens accepted at each verification, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """A whole pass over the prompts."""

    generations: list[Generation]
    seconds: float
    """Of generating, without loading."""

    @property
    def tokens_per_s(self) -> float:
        """Emitted tokens a second, all prompts together."""
        return sum(len(generation.output_ids) for generation in self.generations) / max(self.seconds, 1e-9)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSummary:
    """How a draft did. Acceptance length: tokens emitted per verification, the bonus token included."""

    acceptance_length: float
    per_position: list[float]
    """Share of the verifications that accepted the first, second, … drafted token."""
    by_category: dict[str, float]
    """Acceptance length."""
    by_context: dict[str, float]
    """Acceptance length by context length at the verification, ``from-to`` in tokens."""
    lossless: bool | None
    """Whether every output is the target's own, token for token; None where sampling."""
    tokens_per_s: float
    baseline_tokens_per_s: float
    """The same engine and prompts without the draft."""
    requests: int
    verifications: int


def summarise(
    drafted: Decoding, baseline: Decoding, *, num_speculative_tokens: int, is_greedy: bool
) -> EvaluateSummary:
    """Compare a pass with the draft to one without."""
    accepted: list[int] = []
    by_category: dict[str, list[int]] = defaultdict(list)
    by_context: dict[int, list[int]] = defaultdict(list)
    for generation in drafted.generations:
        accepted += generation.accepted
        by_category[generation.category] += generation.accepted
        # The prompt and the token that its prefill gave.
        context = generation.prompt_length + 1
        for count in generation.accepted:
            by_context[sum(edge <= context for edge in CONTEXT_EDGES) - 1].append(count)
            context += count + 1
    is_same = all(
        ours.output_ids == own.output_ids for ours, own in zip(drafted.generations, baseline.generations, strict=True)
    )
    positions = range(1, num_speculative_tokens + 1)
    return EvaluateSummary(
        acceptance_length=_mean_length(accepted),
        per_position=[_share(accepted, position) for position in positions],
        by_category={name: _mean_length(counts) for name, counts in sorted(by_category.items())},
        by_context={_bucket(index): _mean_length(counts) for index, counts in sorted(by_context.items())},
        lossless=is_same if is_greedy else None,
        tokens_per_s=round(drafted.tokens_per_s, 1),
        baseline_tokens_per_s=round(baseline.tokens_per_s, 1),
        requests=len(drafted.generations),
        verifications=len(accepted),
    )


def _mean_length(accepted: list[int]) -> float:
    return round(1 + sum(accepted) / len(accepted), 4) if accepted else 1.0


def _share(accepted: Iterable[int], position: int) -> float:
    hits = [count >= position for count in accepted]
    return round(sum(hits) / len(hits), 4) if hits else 0.0


def _bucket(index: int) -> str:
    upper = f"-{CONTEXT_EDGES[index + 1]}" if index + 1 < len(CONTEXT_EDGES) else "-"
    return f"{CONTEXT_EDGES[index]}{upper}"
