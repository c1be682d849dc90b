"""Figures from what requests did, by hand."""

import dataclasses

import pytest

from specx.train.evaluate.generations import Generation, Pass, Tally, tally_of, whole_pass
from specx.train.evaluate.summary import Compared, EvaluateSummary, summarise

CATEGORIES = ["a", "b"]


def generation(prompt: int, prompt_length: int, output: list[int], accepted: list[int], seconds: float) -> Generation:
    return Generation(
        prompt=prompt,
        prompt_length=prompt_length,
        output_ids=output,
        accepted=accepted,
        tally=tally_of(accepted),
        seconds=seconds,
    )


DRAFTED = whole_pass(
    [generation(1, 600, [7, 8], [0], 2.0), generation(0, 125, [1, 2, 3, 4, 5, 6], [3, 1], 2.0)], seconds=2.0
)


def compared(drafted: Pass, baseline: Pass | None, batch_size: int = 2) -> Compared:
    return Compared(batch_size=batch_size, drafted=drafted, baseline=baseline)


def figures(*each: Compared, is_greedy: bool = True) -> EvaluateSummary:
    return summarise(each, CATEGORIES, num_speculative_tokens=3, is_greedy=is_greedy)


def test_acceptance_length_counts_the_bonus_token() -> None:
    summary = figures(compared(DRAFTED, DRAFTED))
    assert summary.acceptance_length == round(1 + 4 / 3, 4)
    assert summary.per_position == [round(2 / 3, 4), round(1 / 3, 4), round(1 / 3, 4)]
    assert summary.by_category == {"a": 3.0, "b": 1.0}
    assert summary.tokens_per_s == 4.0


def test_a_verification_belongs_to_the_context_it_was_made_at() -> None:
    # The first of request a is at 126 tokens, its second at 126 + 4 = 130.
    assert figures(compared(DRAFTED, DRAFTED)).by_context == {"0-128": 4.0, "128-512": 2.0, "512-1024": 1.0}


def test_one_other_token_is_not_lossless() -> None:
    first, *rest = DRAFTED.generations
    own = whole_pass([dataclasses.replace(first, output_ids=[1, 2, 3, 4, 5, 9]), *rest], seconds=1.0)
    assert figures(compared(DRAFTED, DRAFTED), compared(DRAFTED, own)).lossless is False
    assert figures(compared(DRAFTED, DRAFTED)).lossless is True
    assert figures(compared(DRAFTED, own), is_greedy=False).lossless is None
    assert figures(compared(DRAFTED, None)).lossless is None


def test_the_table_has_a_row_for_each_category_and_all_of_each_batch_size() -> None:
    slower = dataclasses.replace(DRAFTED, seconds=4.0, tally=None)
    table = figures(compared(DRAFTED, slower, 1), compared(slower, None, 8)).table
    assert [(row["batch_size"], row["category"], row["requests"]) for row in table] == [
        (1, "a", 1),
        (1, "b", 1),
        (1, "all", 2),
        (8, "a", 1),
        (8, "b", 1),
        (8, "all", 2),
    ]
    # Two requests ran at a time: request a alone made 3 tokens a second.
    assert table[0]["tokens_per_s"] == 6.0
    assert table[0]["acceptance_length"] == 3.0
    assert table[2] == {
        "batch_size": 1,
        "category": "all",
        "requests": 2,
        "baseline_tokens_per_s": 2.0,
        "tokens_per_s": 4.0,
        "acceptance_length": 2.333,
        "delta_percent": 100.0,
    }
    assert table[5]["baseline_tokens_per_s"] is None


def test_a_server_that_tells_of_no_request_gives_the_total_and_no_categories() -> None:
    silent = [dataclasses.replace(each, accepted=None, tally=None) for each in DRAFTED.generations]
    tally = Tally(verifications=3, accepted=4, per_position=[2, 1, 1])
    summary = figures(compared(Pass(generations=silent, seconds=2.0, tally=tally), None))
    assert summary.acceptance_length == round(1 + 4 / 3, 4)
    assert (summary.by_category, summary.by_context) == ({}, {})
    assert [row["acceptance_length"] for row in summary.table] == [None, None, 2.333]


def test_turns_without_room_are_counted() -> None:
    summary = summarise([compared(DRAFTED, None)], CATEGORIES, num_speculative_tokens=3, is_greedy=True, turns=4)
    assert (summary.requests, summary.left_out) == (2, 2)


def test_positions_that_one_tally_does_not_know_are_unknown_in_the_sum() -> None:
    total = tally_of([2, 0])
    total.add(Tally(verifications=2, accepted=1, per_position=None))
    assert total == Tally(verifications=4, accepted=3, per_position=None)
    assert total.length == pytest.approx(1.75)
