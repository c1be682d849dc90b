"""Conversations of any length from the tiny target's own answers, as rows that ``extract`` and ``regenerate`` read.

A conversation is the system message once, and behind it turns, each a question and the answer that the target sampled
for it.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

Row = dict[str, Any]
"""``input_ids`` and ``loss_mask``, lists of the same length, and ``category``."""

BUCKETS = ((0, 128), (128, 512), (512, 1024), (1024, 2048), (2048, 4096))
"""Tokens of context, of ``CONTEXT_EDGES`` those that the tiny target reaches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A question and its answer."""

    question: tuple[int, ...]
    """With the tokens that begin an answer."""
    answer: tuple[int, ...]
    category: str

    @property
    def tokens(self) -> int:
        return len(self.question) + len(self.answer)


def read_turns(path: Path, target: Path) -> tuple[tuple[int, ...], list[Turn]]:
    """Return the system message that all rows begin with, and each row's turn."""
    end = AutoTokenizer.from_pretrained(target, local_files_only=True).convert_tokens_to_ids("<|end|>")
    system: tuple[int, ...] = ()
    turns = []
    for row in pq.read_table(path, columns=["input_ids", "loss_mask", "category"]).to_pylist():
        ids, first = tuple(row["input_ids"]), row["loss_mask"].index(1)
        start = ids.index(end) + 1
        assert not system or ids[:start] == system, "another system message"
        system = ids[:start]
        turns.append(Turn(question=ids[start:first], answer=ids[first:], category=row["category"]))
    return system, turns


def conversations(system: Sequence[int], turns: Iterable[Turn], length: int) -> list[Row]:
    """Fill conversations of exactly ``length`` tokens with turns, in order; every answer is supervised.

    A turn that does not fit goes on in the next conversation, behind its system message; the last one is left out,
    which is not full.
    """
    rows = []
    body: list[tuple[int, int]] = []
    for turn in turns:
        body += [(index, 0) for index in turn.question] + [(index, 1) for index in turn.answer]
        while len(system) + len(body) >= length:
            taken, body = body[: length - len(system)], body[length - len(system) :]
            tokens = [(index, 0) for index in system] + taken
            rows.append(
                {
                    "input_ids": [index for index, _ in tokens],
                    "loss_mask": [is_supervised for _, is_supervised in tokens],
                    "category": "mixed",
                }
            )
    return rows


def pieces(rows: Iterable[Row], length: int) -> list[Row]:
    """Cut rows into pieces of ``length`` tokens, which divides theirs: the same tokens at fewer positions."""
    cut = []
    for row in rows:
        assert len(row["input_ids"]) % length == 0
        for start in range(0, len(row["input_ids"]), length):
            part = slice(start, start + length)
            cut.append(row | {"input_ids": row["input_ids"][part], "loss_mask": row["loss_mask"][part]})
    return cut


def questions(system: Sequence[int], turns: Sequence[Turn], count: int, longest: int, seed: int) -> list[Row]:
    """Return ``count`` rows for each bucket, whose last question ends at a context within the bucket.

    What stands before it are turns drawn at random; in the first bucket nothing does. A question comes once in a
    bucket, and ends before ``longest`` tokens. Only its answer is supervised.
    """
    chosen = random.Random(seed)
    rows = []
    for low, high in BUCKETS:
        first = len(system)
        asked = [turn for turn in turns if first + len(turn.question) < min(high, BUCKETS[1][1])]
        for last in chosen.sample(asked, count):
            length = chosen.randrange(max(low, first + len(last.question)), min(high, longest)) if low else 0
            before: list[int] = []
            while first + len(before) + len(last.question) < length:
                turn = chosen.choice(turns)
                before = [*turn.question, *turn.answer, *before]
            # The oldest turn loses its beginning.
            kept = before[len(before) - max(length - first - len(last.question), 0) :]
            ids = [*system, *kept, *last.question]
            mask = [0] * len(ids) + [1] * len(last.answer)
            rows.append({"input_ids": [*ids, *last.answer], "loss_mask": mask, "category": last.category})
    return rows


def write_rows(rows: list[Row], path: Path) -> None:
    """Write them as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def described(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return, by the bucket that they stand in, how many supervised tokens there are and how repetitive they are.

    ``repeated`` is the share of the tokens that end four in a row which the same answer had before.
    """
    tokens = dict.fromkeys(BUCKETS, 0)
    repeated = dict.fromkeys(BUCKETS, 0)
    for row in rows:
        ids, mask = row["input_ids"], row["loss_mask"]
        seen: set[tuple[int, ...]] = set()
        for position in (position for position, is_supervised in enumerate(mask) if is_supervised):
            bucket = next(each for each in BUCKETS if each[0] <= position < each[1])
            four = tuple(ids[position - 3 : position + 1])
            tokens[bucket] += 1
            repeated[bucket] += four in seen
            seen.add(four)
    return {
        f"{low}-{high}": {
            "tokens": tokens[low, high],
            "repeated": round(repeated[low, high] / max(tokens[low, high], 1), 3),
        }
        for low, high in BUCKETS
    }
