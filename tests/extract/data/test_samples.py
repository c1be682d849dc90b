"""Every row becomes a sample, or a reject with its reason, row number and file."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specx import SpecxError
from specx.extract.config import ExtractConfig
from specx.extract.data.samples import DataError, Sample, SampleReader
from specx.extract.pipeline import run
from specx.extract.target import open_target
from specx.storage.catalog.rejects import read_rejects
from specx.storage.schema import Reject
from specx.storage.store import FeatureStore

Row = Mapping[str, Any]

GOOD: Row = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}
QUESTION = {"role": "user", "content": "Are you there?"}
ANSWER = {"role": "assistant", "content": "Yes."}
TOO_LONG: Row = {"input_ids": list(range(9)), "loss_mask": [0, 1, 1, 1, 1, 1, 1, 1, 1]}
"""One token more than ``max_length=8``."""

REJECTED: list[tuple[str, Row, str]] = [
    ("empty", {"input_ids": [], "loss_mask": []}, "0 tokens"),
    ("empty", {"input_ids": [5], "loss_mask": [1]}, "1 tokens"),
    ("empty", {"input_ids": None, "loss_mask": None}, "no input_ids and loss_mask"),
    ("mask_length", {"input_ids": [5, 6, 7], "loss_mask": [0, 1]}, "2 mask entries for 3 tokens"),
    ("mask_value", {"input_ids": [5, 6, 7], "loss_mask": [0, 2, 1]}, "other than 0 and 1"),
    ("id_out_of_range", {"input_ids": [5, 2048], "loss_mask": [0, 1]}, "token id 2048.* 2048"),
    ("id_out_of_range", {"input_ids": [-1, 5], "loss_mask": [0, 1]}, "token id -1"),
    ("too_long", TOO_LONG, "9 tokens, the limit is 8"),
    ("nothing_supervised", {"input_ids": [5, 6], "loss_mask": [0, 0]}, "none of 2 tokens"),
    ("not_integers", {"input_ids": [5, None], "loss_mask": [0, 1]}, "input_ids is not a list of integers"),
    ("not_successful", {**GOOD, "status": "error"}, "status is 'error'"),
    ("not_rendered", {"messages": [QUESTION]}, "the last message is not the assistant's"),
    ("not_rendered", {"messages": [{"role": "pope", "content": "?"}, ANSWER]}, "unknown role: pope"),
    ("not_rendered", {"conversations": [{"role": "user", "content": None}, ANSWER]}, "role and content as text"),
]


@pytest.fixture(scope="module")
def tokenizer(target: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(target, local_files_only=True)


@pytest.fixture(scope="module")
def conversations(regen: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (regen / "conversations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recorded(regen: Path, conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of exact sampled ids of each conversation; an id names a prompt's source, several rows may share it."""
    rows = {(row["id"], json.dumps(row["messages"])): row for row in pq.read_table(regen / "train.parquet").to_pylist()}

    def key(row: dict[str, Any]) -> tuple[str, str]:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["conversations"][:-1]]
        return row["id"], json.dumps(turns)

    return [rows[key(row)] for row in conversations]


@pytest.fixture(scope="module")
def rendered(target: Path, regen: Path) -> list[Sample]:
    samples = read(target, regen / "conversations.jsonl")
    assert all(isinstance(sample, Sample) for sample in samples)
    return samples


def write(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(target: Path, *data: Path, **settings: Any) -> list[Any]:
    config = ExtractConfig(target=str(target), data=tuple(map(str, data)), store="unused", **settings)
    return list(SampleReader(config, open_target(config.target)))


def prompt_length(mask: Any) -> int:
    return int(np.argmax(mask))


def without_generation_marks(target: Path, directory: Path) -> Path:
    """Copy the target with a chat template that does not say what the model sampled."""
    copy = Path(shutil.copytree(target, directory))
    template = (copy / "chat_template.jinja").read_text()
    for mark in ("{%- generation -%}", "{%- endgeneration -%}"):
        assert mark in template
        template = template.replace(mark, "{#- -#}")
    (copy / "chat_template.jinja").write_text(template)
    return copy


def test_token_ids_are_taken_as_they_stand(target: Path, tmp_path: Path) -> None:
    (sample,) = read(target, write(tmp_path / "rows.jsonl", [{**GOOD, "category": "chat"}]))
    assert sample.input_ids.tolist() == [5, 6, 7]
    assert sample.loss_mask.tolist() == [0, 1, 1]
    assert (sample.input_ids.dtype, sample.loss_mask.dtype) == (np.int32, np.uint8)
    assert (sample.origin.source, sample.origin.row, sample.origin.category) == (
        str(tmp_path / "rows.jsonl"),
        0,
        "chat",
    )


def test_parquet_rows_are_read_in_order_and_whole(target: Path, regen: Path) -> None:
    rows = pq.read_table(regen / "dev.parquet").to_pylist()
    samples = read(target, regen / "dev.parquet")
    assert [sample.input_ids.tolist() for sample in samples] == [row["input_ids"] for row in rows]
    assert [sample.loss_mask.tolist() for sample in samples] == [row["loss_mask"] for row in rows]
    assert [sample.origin.category for sample in samples] == [row["category"] for row in rows]


def test_rendered_prompt_is_the_one_that_was_served(rendered: list[Sample], recorded: list[dict[str, Any]]) -> None:
    for sample, row in zip(rendered, recorded, strict=True):
        length = prompt_length(row["loss_mask"])
        assert sample.input_ids[:length].tolist() == row["input_ids"][:length]
        assert prompt_length(sample.loss_mask) == length


def test_rendered_ids_are_the_sampled_ones_wherever_these_round_trip(
    rendered: list[Sample], recorded: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    round_trips = 0
    for sample, row in zip(rendered, recorded, strict=True):
        length = prompt_length(row["loss_mask"])
        assert tokenizer.decode(sample.input_ids[length:]) == row["text"]
        if tokenizer(row["text"], add_special_tokens=False)["input_ids"] == row["input_ids"][length:]:
            round_trips += 1
            assert sample.input_ids.tolist() == row["input_ids"]
            assert sample.loss_mask.tolist() == row["loss_mask"]
    # Most do; a sampled spelling that the tokenizer would not choose is why recorded ids win.
    assert len(rendered) // 2 < round_trips < len(rendered)


def test_mask_covers_exactly_the_answer_from_its_channel_to_its_return(
    rendered: list[Sample], tokenizer: PreTrainedTokenizerBase
) -> None:
    channel, end = tokenizer.convert_tokens_to_ids(["<|channel|>", "<|return|>"])
    for sample in rendered:
        first = prompt_length(sample.loss_mask)
        assert sample.loss_mask[first:].all()
        assert (sample.input_ids[first], sample.input_ids[-1]) == (channel, end)
        assert tokenizer.decode(sample.input_ids[:first]).endswith("<|start|>assistant")


def test_reasoning_is_rendered_whatever_its_key_and_column_are(target: Path, tmp_path: Path) -> None:
    def turns(key: str) -> list[Row]:
        return [QUESTION, {**ANSWER, key: "The user asks."}]

    forms: list[Row] = [
        {"messages": turns("thinking")},
        {"messages": turns("reasoning_content")},
        {"conversations": turns("thinking")},
        {"conversations": turns("reasoning_content"), "status": "success"},
    ]
    samples = read(target, write(tmp_path / "rows.jsonl", forms))
    assert len({sample.input_ids.tobytes() for sample in samples}) == 1
    (plain,) = read(target, write(tmp_path / "plain.jsonl", [{"messages": [QUESTION, ANSWER]}]))
    assert len(plain.input_ids) < len(samples[0].input_ids)


def test_reasoning_of_earlier_turns_is_not_in_the_prompt(target: Path, tmp_path: Path) -> None:
    past = [QUESTION, {**ANSWER, "thinking": "Old thoughts."}, QUESTION, ANSWER]
    forgotten = [QUESTION, ANSWER, QUESTION, ANSWER]
    rows = write(tmp_path / "rows.jsonl", [{"messages": past}, {"messages": forgotten}])
    with_past, without = read(target, rows)
    assert with_past.input_ids.tolist() == without.input_ids.tolist()


def test_template_without_generation_marks_gives_the_same_ids_and_mask(
    target: Path, regen: Path, rendered: list[Sample], tmp_path: Path
) -> None:
    unmarked = read(without_generation_marks(target, tmp_path / "target"), regen / "conversations.jsonl", limit=60)
    for sample, expected in zip(unmarked, rendered, strict=False):
        assert sample.input_ids.tolist() == expected.input_ids.tolist()
        assert sample.loss_mask.tolist() == expected.loss_mask.tolist()


def test_template_whose_prompt_is_no_prefix_of_the_conversation_is_not_guessed_at(target: Path, tmp_path: Path) -> None:
    copy = without_generation_marks(target, tmp_path / "target")
    template = copy / "chat_template.jinja"
    template.write_text("{{ messages | length }}" + template.read_text())
    (reject,) = read(copy, write(tmp_path / "rows.jsonl", [{"messages": [QUESTION, ANSWER]}]))
    assert reject.reason == "not_rendered"
    assert "not a prefix" in reject.detail


def test_token_ids_win_over_a_conversation_in_the_same_row(target: Path, tmp_path: Path) -> None:
    both = {**GOOD, "messages": [QUESTION, ANSWER]}
    only_messages = {"input_ids": None, "loss_mask": None, "messages": [QUESTION, ANSWER]}
    first, second = read(target, write(tmp_path / "rows.jsonl", [both, only_messages]))
    assert first.input_ids.tolist() == GOOD["input_ids"]
    assert len(second.input_ids) > len(first.input_ids)


@pytest.mark.parametrize(("reason", "row", "detail"), REJECTED, ids=[f"{case[0]}-{case[2]}" for case in REJECTED])
def test_bad_row_is_rejected_with_its_number_and_file(
    target: Path, tmp_path: Path, reason: str, row: Row, detail: str
) -> None:
    rows = write(tmp_path / "rows.jsonl", [GOOD, GOOD, row, GOOD])
    before, _, reject, after = read(target, rows, max_length=8)
    assert isinstance(reject, Reject)
    assert (reject.source, reject.row, reject.reason) == (str(tmp_path / "rows.jsonl"), 2, reason)
    assert re.search(detail, reject.detail)
    assert before.input_ids.tolist() == after.input_ids.tolist() == GOOD["input_ids"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1.5, 2.0], "loss_mask": [0, 1]}, "not_integers"),
        ({"input_ids": ["5", "6"], "loss_mask": [0, 1]}, "not_integers"),
        ({"input_ids": "567", "loss_mask": [0, 1, 1]}, "not_integers"),
        ({"input_ids": [[5], [6, 7]], "loss_mask": [0, 1]}, "not_integers"),
        ({"messages": ["hello", "you"]}, "not_rendered"),
        ({"messages": "hello"}, "not_rendered"),
        ({"messages": [QUESTION, None]}, "not_rendered"),
    ],
    ids=["floats", "strings", "text", "ragged", "list of text", "plain text", "null turn"],
)
def test_row_of_another_shape_is_rejected(target: Path, tmp_path: Path, row: Row, reason: str) -> None:
    (reject,) = read(target, write(tmp_path / "rows.jsonl", [row]))
    assert isinstance(reject, Reject)
    assert reject.reason == reason


def test_too_long_row_is_cut_only_where_that_was_asked_for(target: Path, tmp_path: Path) -> None:
    late: Row = {"input_ids": list(range(9)), "loss_mask": [0] * 8 + [1]}
    cut, nothing_left = read(
        target, write(tmp_path / "rows.jsonl", [TOO_LONG, late]), max_length=8, too_long="truncate"
    )
    assert cut.input_ids.tolist() == TOO_LONG["input_ids"][:8]
    assert cut.loss_mask.tolist() == TOO_LONG["loss_mask"][:8]
    assert nothing_left.reason == "nothing_supervised"


def test_no_sequence_is_longer_than_the_target_can_read(target: Path, tmp_path: Path) -> None:
    ids = [5] * 4097
    (reject,) = read(
        target, write(tmp_path / "rows.jsonl", [{"input_ids": ids, "loss_mask": [1] * 4097}]), max_length=9999
    )
    assert reject.reason == "too_long"
    assert "the limit is 4096" in reject.detail


def test_limit_counts_the_rows_of_all_files(target: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", [GOOD, {"input_ids": [5], "loss_mask": [1]}, GOOD])
    second = write(tmp_path / "second.jsonl", [GOOD] * 3)
    rows = read(target, first, second, limit=4)
    assert [type(row) for row in rows] == [Sample, Reject, Sample, Sample]
    assert rows[3].origin.source == str(second)
    assert len(read(target, first, second)) == 6


def test_every_row_read_is_counted_once(target: Path, tmp_path: Path) -> None:
    bad = [row for reason, row, _ in REJECTED]
    twice: Row = {"input_ids": [9, 8, 7, 6], "loss_mask": [0, 0, 1, 1]}
    data = (
        write(tmp_path / "first.jsonl", [GOOD, twice, GOOD, *bad]),
        write(tmp_path / "second.jsonl", [twice, {"input_ids": [3, 3], "loss_mask": [0, 1]}]),
    )
    config = ExtractConfig(
        target=str(target), data=tuple(map(str, data)), store=str(tmp_path / "store"), max_length=200, top_k=4
    )
    # At this length one of the bad rows is a good one.
    expected = Counter(reason for reason, _, _ in REJECTED if reason != "too_long")
    summary = run(config)
    assert (summary.sequences, summary.reused, summary.rejected) == (4, 2, expected.total())
    assert summary.sequences + summary.reused + summary.rejected == 5 + len(bad)
    store = FeatureStore.open(config.store)
    assert len(store.catalogue()) == 4
    rejects = read_rejects(store.place)
    assert Counter(reject.reason for reject in rejects) == expected
    assert {reject.source for reject in rejects} == {str(tmp_path / "first.jsonl")}
    assert [reject for record in store.records.values() for reject in record.rejected] == rejects
    again = run(config)
    assert (again.sequences, again.reused, again.rejected) == (0, 6, expected.total())
    assert read_rejects(store.place) == rejects


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "no such file"),
        ("rows.csv", b"input_ids\n", r"ends in '\.csv', expected one of \.parquet"),
        ("rows.jsonl", b"", "the file is empty, expected rows with input_ids"),
        ("rows.jsonl", b"\n\n", "no rows"),
        ("rows.jsonl", b'{"input_ids": [1, 2\n', "cannot be read: JSON parse error"),
        ("rows.jsonl", b'{"messages": "\xff"}\n', "cannot be read: 'utf-8'"),
        ("rows.jsonl", b'{"prompt": "a", "text": "b"}\n', "unknown columns prompt, text; expected input_ids and"),
        ("rows.parquet", b"not a table", "cannot be read"),
    ],
)
def test_unreadable_file_is_named(target: Path, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        read(target, path)


def test_table_without_rows_is_named(target: Path, tmp_path: Path) -> None:
    lists = pa.array([], pa.list_(pa.int64()))
    pq.write_table(pa.table({"input_ids": lists, "loss_mask": lists}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: no rows, expected"):
        read(target, tmp_path / "rows.parquet")


def test_damaged_table_is_named(target: Path, regen: Path, tmp_path: Path) -> None:
    content = bytearray((regen / "train.parquet").read_bytes())
    middle = len(content) // 3
    content[middle : middle + 2000] = b"\xff" * 2000
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet: row \d+ cannot be read"):
        read(target, tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("removed", "message"),
    [("tokenizer*", "no usable tokenizer"), ("chat_template.jinja", "the tokenizer has no chat template")],
)
def test_conversations_need_what_the_target_lacks(target: Path, tmp_path: Path, removed: str, message: str) -> None:
    copy = Path(shutil.copytree(target, tmp_path / "target"))
    for path in copy.glob(removed):
        path.unlink()
    assert len(read(copy, write(tmp_path / "ids.jsonl", [GOOD]))) == 1
    with pytest.raises(SpecxError, match=message):
        read(copy, write(tmp_path / "rows.jsonl", [{"messages": [QUESTION, ANSWER]}]))
