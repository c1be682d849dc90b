"""What goes back to the target of what it said."""

from pathlib import Path

import pytest

from specx.train.evaluate.chat_template import ChatTemplate


@pytest.fixture(scope="module")
def template(target: Path) -> ChatTemplate:
    return ChatTemplate(target)


def ids(template: ChatTemplate, text: str) -> list[int]:
    found: list[int] = template._tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Good day.<|return|>",
            "Good day.",
        ),
        ("<|channel|>final<|message|>Cut off in the mid", "Cut off in the mid"),
        ("<|channel|>analysis<|message|>Still thinking", ""),
        ("Plain text.", "Plain text."),
        ("Long thoughts</think>\n\nThe answer", "The answer"),
    ],
    ids=["harmony", "cut off", "without an answer", "plain", "thoughts"],
)
def test_only_the_answer_goes_back(template: ChatTemplate, generated: str, answer: str) -> None:
    assert template.answer(ids(template, generated)) == answer


def test_effort_and_date_are_in_the_prompt(target: Path) -> None:
    said = [{"role": "user", "content": "Hello"}]
    rendered = ChatTemplate(target, effort="high", date="2025-03-04")
    text = rendered._tokenizer.decode(rendered.prompt(said, ""))
    assert "Current date: 2025-03-04" in text
    assert "Reasoning: high" in text
    assert text.endswith("Hello<|end|><|start|>assistant")
