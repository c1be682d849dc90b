"""Figures from what requests did, by hand."""

from specx.train.evaluate.result import Decoding, Generation, summarise


def generation(category: str, prompt_length: int, output: list[int], accepted: list[int]) -> Generation:
    return Generation(prompt_length=prompt_length, category=category, output_ids=output, accepted=accepted)


DRAFTED = Decoding(
    generations=[generation("a", 125, [1, 2, 3, 4, 5, 6], [3, 1]), generation("b", 600, [7, 8], [0])], seconds=2.0
)


def test_acceptance_length_counts_the_bonus_token() -> None:
    summary = summarise(DRAFTED, DRAFTED, num_speculative_tokens=3, is_greedy=True)
    assert summary.acceptance_length == round(1 + 4 / 3, 4)
    assert summary.per_position == [round(2 / 3, 4), round(1 / 3, 4), round(1 / 3, 4)]
    assert summary.by_category == {"a": 3.0, "b": 1.0}
    assert summary.tokens_per_s == 4.0


def test_a_verification_belongs_to_the_context_it_was_made_at() -> None:
    # The first of request a is at 126 tokens, its second at 126 + 4 = 130.
    summary = summarise(DRAFTED, DRAFTED, num_speculative_tokens=3, is_greedy=True)
    assert summary.by_context == {"0-128": 4.0, "128-512": 2.0, "512-1024": 1.0}


def test_one_other_token_is_not_lossless() -> None:
    own = Decoding(generations=[generation("a", 125, [1, 2, 3, 4, 5, 9], []), DRAFTED.generations[1]], seconds=1.0)
    assert summarise(DRAFTED, own, num_speculative_tokens=3, is_greedy=True).lossless is False
    assert summarise(DRAFTED, DRAFTED, num_speculative_tokens=3, is_greedy=True).lossless is True
    assert summarise(DRAFTED, own, num_speculative_tokens=3, is_greedy=False).lossless is None
