"""Every shape of prompts, and what is wrong with others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specx import SpecxError
from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore
from specx.train.data.datamodule import split_sequences
from specx.train.evaluate.chat_template import ChatTemplate
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.prompts import Prompt, read_prompts

SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
ANSWER = {"role": "assistant", "content": "Good day."}


def read(target: Path, *data: Path, **settings: Any) -> list[Prompt]:
    return read_prompts(EvaluateConfig(draft="", target=str(target), data=tuple(map(str, data)), **settings))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": SAID},
        {"messages": [*SAID, ANSWER]},
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hello"}]},
        {"prompt": SAID},
    ],
    ids=["messages", "with an answer", "conversations", "prompt"],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_conversation_is_asked_without_its_answer(
    target: Path, tmp_path: Path, row: dict[str, Any], suffix: str
) -> None:
    path = tmp_path / f"rows.{suffix}"
    whole = {"id": "first", "category": "chat"} | row
    if suffix == "jsonl":
        write(path, whole)
    else:
        pq.write_table(pa.Table.from_pylist([whole]), path)
    (prompt,) = read(target, path)
    assert prompt.ids == ChatTemplate(target).prompt(SAID, "")
    assert (prompt.name, prompt.category, prompt.later_turns) == ("first", "chat", ())


def test_text_is_what_the_user_says(target: Path, tmp_path: Path) -> None:
    prompts = read(target, write(tmp_path / "rows.jsonl", {"prompt": "Hello"}, {"text": "Hello"}))
    assert [prompt.ids for prompt in prompts] == [ChatTemplate(target).prompt(SAID[1:], "")] * 2
    assert [prompt.name for prompt in prompts] == ["0", "1"]


def test_questions_in_turns_are_asked_one_after_the_other(target: Path, questions: Path) -> None:
    prompts = read(target, questions)
    assert [prompt.name for prompt in prompts] == ["81", "82", "83", "84"]
    assert prompts[0].messages == ({"role": "user", "content": "Hello! How are you today?"},)
    assert prompts[0].later_turns == ("And what will you do tomorrow?",)
    assert prompts[3].category == "story"


def test_recorded_ids_are_taken_up_to_the_first_that_was_sampled(target: Path, tmp_path: Path, questions: Path) -> None:
    row = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1], "messages": SAID}
    prompts = read(target, write(tmp_path / "rows.jsonl", row, row), questions, limit=3)
    assert [prompt.ids for prompt in prompts[:2]] == [[5, 6], [5, 6]]
    assert prompts[2].name == "81"


def test_the_held_out_prompts_of_a_store_are_those_that_training_leaves_out(target: Path, tiny_store: Path) -> None:
    from specx.train.data.corpus import Corpus

    reader = FeatureReader(FeatureStore.open(str(tiny_store)))
    prompts = read(target, store=str(tiny_store), holdout_fraction=0.1)
    held_out = split_sequences(Corpus([reader], ()), 0.1).holdout
    assert [bytes.fromhex(prompt.name) for prompt in prompts] == [bytes(reader.catalogue.ids[i]) for i in held_out]
    features = reader.features(int(held_out[0]))
    first = int(np.flatnonzero(features.loss_mask)[0])
    assert prompts[0].ids == features.input_ids[:first].tolist()
    assert len(read(target, store=str(tiny_store), split="all")) == 120


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Hello"}], "rows.jsonl: no column of input_ids and loss_mask, messages.* among question"),
        ([{"prompt": "Hello"}, {"other": 1}], "rows.jsonl: row 1 has none of messages"),
        ([{"prompt": "Hello"}, [1]], "rows.jsonl: row 1 is a list, expected an object"),
        ([{"turns": ["Hello", 5]}], "rows.jsonl: row 0: turns are texts"),
        ([{"prompt": 5}], "rows.jsonl: row 0: prompt is of type int"),
        ([{"messages": [{"role": "user", "content": None}]}], "rows.jsonl: row 0: a message needs role and content"),
        ([{"messages": [ANSWER]}], "rows.jsonl: row 0: nothing before the answer"),
        ([{"messages": [{"role": "judge", "content": "x"}]}], "rows.jsonl: row 0: the chat template refused it"),
        ([{"input_ids": [5], "loss_mask": [1]}], "no prompts, expected rows with"),
    ],
    ids=str,
)
def test_a_row_that_is_no_prompt_is_named(target: Path, tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(SpecxError, match=message):
        read(target, write(tmp_path / "rows.jsonl", *rows))


def test_a_store_without_held_out_sequences_is_refused(target: Path, tiny_store: Path) -> None:
    with pytest.raises(SpecxError, match=r"none of its 120 sequences is held out at 1e-09\. Give --split all"):
        read(target, store=str(tiny_store), holdout_fraction=1e-9)
