"""Templates of other models: what was sampled is supervised, and nothing that was not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specx import SpecxError
from specx.extract.data.chat_template import ChatRenderer, DateMissingError, NotRenderedError

# In the tiny target's vocabulary <|return|> ends a generation. Reasoning in tags, a line feed behind each turn.
PLAIN = """
{%- for message in messages -%}
{{- '<|start|>' ~ message.role ~ '\n' -}}
{%- if message.reasoning_content -%}{{- '<think>\n' ~ message.reasoning_content ~ '\n</think>\n\n' -}}{%- endif -%}
{{- message.content ~ '<|return|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant\n' -}}{%- endif -%}
"""
MARKED = """
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|start|>assistant\n' -}}{%- generation -%}{{- message.content ~ '<|return|>' -}}{%- endgeneration -%}{{- '\n' -}}
{%- else -%}{{- '<|start|>' ~ message.role ~ '\n' ~ message.content ~ '<|return|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant\n' -}}{%- endif -%}
"""
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First.", "thinking": "Old."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second.", "thinking": "New."},
]
SERVED = "<|start|>user\nOne?<|return|>\n<|start|>assistant\nFirst.<|return|>\n<|start|>user\nTwo?<|return|>\n"
SERVED += "<|start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(target: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(target, local_files_only=True)


@pytest.fixture
def copy(target: Path, tmp_path: Path) -> Path:
    """The target's tokenizer, whose template is to be replaced."""
    names = ("tokenizer*", "*config.json", "chat_template.jinja")
    files = [path for name in names for path in target.glob(name)]
    for path in files:
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def renderer(directory: Path, template: str) -> ChatRenderer:
    (directory / "chat_template.jinja").write_text(template)
    return ChatRenderer(directory)


def halves(tokenizer: PreTrainedTokenizerBase, rendered: tuple[Any, Any]) -> tuple[str, str]:
    """The text of the prompt and that of the answer, which must follow it to the end."""
    ids, mask = rendered
    start = int(mask.argmax())
    assert mask.tolist() == [0] * start + [1] * (len(ids) - start)
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


def test_text_behind_the_sampled_end_is_left_out(copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = "<think>\nNew.\n</think>\n\nSecond.<|return|>"
    assert halves(tokenizer, renderer(copy, PLAIN).render(TURNS)) == (SERVED, answer)


def test_marks_of_earlier_answers_are_not_supervised(copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert halves(tokenizer, renderer(copy, MARKED).render(TURNS)) == (SERVED, "Second.<|return|>")


@pytest.mark.parametrize(
    ("answer", "sampled"),
    [
        ({"content": "Sec", "thinking": "New."}, "<think>\nNew.\n</think>\n\nSec"),
        ({"content": "", "thinking": "Ne"}, "<think>\nNe"),
        ({"content": None, "reasoning_content": "Ne"}, "<think>\nNe"),
        ({"content": "Sec <|return"}, "Sec <|return"),
        ({"content": "Sec \n"}, "Sec \n"),
    ],
    ids=str,
)
def test_truncated_answer_has_no_invented_end(
    copy: Path, tokenizer: PreTrainedTokenizerBase, answer: dict[str, str], sampled: str
) -> None:
    turns = [*TURNS[:3], {"role": "assistant", **answer}]
    assert halves(tokenizer, renderer(copy, PLAIN).render(turns, truncated=True)) == (SERVED, sampled)


def test_prompt_ends_where_the_target_is_to_go_on(copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = renderer(copy, PLAIN)
    assert tokenizer.decode(chat.prompt(TURNS[:3])) == SERVED
    with pytest.raises(NotRenderedError, match="the last message is the assistant's"):
        chat.prompt(TURNS)


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d %b %Y"])
def test_clock_of_the_template_shows_the_given_date(copy: Path, tokenizer: PreTrainedTokenizerBase, form: str) -> None:
    chat = renderer(copy, "{{- strftime_now('" + form + "') ~ '\n' -}}" + PLAIN)
    expected = {"%Y-%m-%d": "2025-08-05", "%d %b %Y": "05 Aug 2025"}[form]
    assert chat.takes_date
    assert tokenizer.decode(chat.prompt(TURNS[:1], date="2025-08-05")).startswith(expected + "\n<|start|>user")
    with pytest.raises(DateMissingError, match="Give --date YYYY-MM-DD, the day the answers were generated"):
        chat.prompt(TURNS[:1])


def test_template_without_date_and_effort_takes_none(copy: Path) -> None:
    chat = renderer(copy, PLAIN)
    assert not chat.takes_date
    assert not chat.takes_effort
    plain, given = chat.prompt(TURNS[:1]), chat.prompt(TURNS[:1], effort="high", date="2025-08-05")
    assert plain.tolist() == given.tolist()


def test_message_that_the_template_skips_is_not_lost_without_a_word(copy: Path) -> None:
    chat = renderer(copy, PLAIN.replace("messages -%}", "messages if message.role != 'system' -%}", 1))
    with pytest.raises(NotRenderedError, match="leaves out a message of role 'system'"):
        chat.render([{"role": "system", "content": "Be brief."}, *TURNS])


def test_answer_whose_prompt_is_shown_otherwise_later_is_refused(copy: Path) -> None:
    changing = "{{- messages | length ~ '\n' -}}"
    with pytest.raises(NotRenderedError, match="not a prefix"):
        renderer(copy, changing + PLAIN).render(TURNS)
    with pytest.raises(NotRenderedError, match="not a prefix"):
        renderer(copy, changing + MARKED).render(TURNS)
    with pytest.raises(NotRenderedError, match="not a prefix"):
        renderer(copy, changing + MARKED).render(TURNS[:2], truncated=True)


def test_marks_of_the_only_answer_need_no_prefix(copy: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = renderer(copy, "{{- messages | length ~ '\n' -}}" + MARKED)
    served = "2\n<|start|>user\nOne?<|return|>\n<|start|>assistant\n"
    assert halves(tokenizer, chat.render(TURNS[:2])) == (served, "First.<|return|>")


@pytest.mark.parametrize("content", ["lone \ud800 surrogate", "\x00", "<|start|>"])
def test_odd_text_is_rendered_or_refused(copy: Path, content: str) -> None:
    chat = renderer(copy, PLAIN)
    turns = [{"role": "user", "content": content}, TURNS[3]]
    if content.startswith("lone"):
        with pytest.raises(NotRenderedError, match="refused it"):
            chat.render(turns)
    else:
        assert chat.render(turns)[1].any()


def test_broken_generation_config_is_named(copy: Path) -> None:
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(SpecxError, match=r"generation_config\.json: not a JSON object"):
        ChatRenderer(copy)
