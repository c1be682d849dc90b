"""What engines did: with one turn of one prompt, and in a whole pass over the prompts."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class Tally:
    """Verifications and what they accepted, summed."""

    verifications: int = 0
    accepted: int = 0
    """Drafted tokens."""
    per_position: list[int] | None = field(default_factory=list)
    """Verifications that accepted at least 1, 2, … drafted tokens; None where the engine does not tell."""

    def add(self, other: "Tally") -> None:
        """Add another's sums; positions that either does not know are unknown."""
        self.verifications += other.verifications
        self.accepted += other.accepted
        if self.per_position is None or other.per_position is None:
            self.per_position = None
            return
        longest = max(len(self.per_position), len(other.per_position))
        ours, theirs = (each + [0] * (longest - len(each)) for each in (self.per_position, other.per_position))
        self.per_position = [a + b for a, b in zip(ours, theirs, strict=True)]

    @property
    def length(self) -> float:
        """Acceptance length: tokens emitted per verification, the bonus token included; 1 without any."""
        return 1 + self.accepted / self.verifications if self.verifications else 1.0


def tally_of(accepted: Iterable[int]) -> Tally:
    """Sum up the drafted tokens accepted at each verification."""
    counts = list(accepted)
    return Tally(
        verifications=len(counts),
        accepted=sum(counts),
        per_position=[sum(count >= position for count in counts) for position in range(1, max(counts, default=0) + 1)],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What one engine did with one turn."""

    prompt: int
    """Number of the prompt among all."""
    turn: int = 0
    prompt_length: int
    output_ids: list[int]
    accepted: list[int] | None = None
    """Drafted tokens accepted at each verification, in order; None where the engine does not tell."""
    tally: Tally | None = None
    """Their sums; None where the engine knows only those of everything together."""
    seconds: float
    """From the request to its last token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """All prompts decoded once."""

    generations: list[Generation]
    """In the order of prompts and turns."""
    seconds: float
    """Of generating, without loading."""
    tally: Tally | None = None
    """Of all verifications; None without a draft."""

    @property
    def tokens(self) -> int:
        """Emitted tokens."""
        return sum(len(each.output_ids) for each in self.generations)

    @property
    def tokens_per_s(self) -> float:
        """Emitted tokens a second, all requests together."""
        return self.tokens / max(self.seconds, 1e-9)


def whole_pass(generations: Iterable[Generation], seconds: float) -> Pass:
    """Put a pass together from requests that tell their own verifications, if there were any."""
    ordered = sorted(generations, key=lambda each: (each.prompt, each.turn))
    tallies = [each.tally for each in ordered if each.tally is not None]
    total = Tally() if tallies else None
    for tally in tallies:
        assert total is not None
        total.add(tally)
    return Pass(generations=ordered, seconds=seconds, tally=total)
