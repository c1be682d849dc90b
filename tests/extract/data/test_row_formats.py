"""Every shape of data that is known gives the ids and the mask of what the target generated."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from specx.extract.config import ExtractConfig
from specx.extract.data.row_formats import Reason
from specx.extract.data.samples import DataError, Sample, SampleReader
from specx.extract.target import open_target
from specx.storage.schema import Reject

Row = Mapping[str, Any]

PROMPT = "<|start|>user<|message|>Are you there?<|end|><|start|>assistant"
ANALYSIS = "<|channel|>analysis<|message|>The user asks.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>Yes.<|return|>"
USER = {"role": "user", "content": "Are you there?"}
ANSWER = {"role": "assistant", "content": "Yes."}
RECORDED: Row = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 0, 1]}

TOKEN_IDS: dict[str, Row] = {
    "token ids": RECORDED,
    "mask of truth values": {**RECORDED, "loss_mask": [False, True, False, True]},
    "speculators": {"id": "a", "primary_id": "b", **RECORDED, "text": "no matter", "metadata": {"turn": 1}},
    "regenerate": {
        "id": "a",
        "category": "chat",
        "messages": [USER, ANSWER],
        **RECORDED,
        "finish_reason": "length",
        "text": "no matter",
        "reasoning_effort": "high",
        "date": "2025-08-05",
    },
}
CONVERSATIONS: dict[str, tuple[Row, str]] = {
    "regenerated": (
        {"id": 1, "conversations": [USER, ANSWER | {"reasoning_content": "The user asks."}], "status": "success"},
        ANALYSIS + FINAL,
    ),
    "older gpt-oss": (
        {
            "conversations": [
                {"from": "human", "value": "Are you there?"},
                {"from": "assistant_analysis", "value": "The user asks."},
                {"from": "assistant_final", "value": "Yes."},
                {"from": "assistant_reasoning_effort", "value": "medium"},
            ]
        },
        ANALYSIS + FINAL,
    ),
    "older gpt-oss with role and content": (
        {
            "conversations": [
                {"role": "assistant_reasoning_effort", "content": "medium"},
                USER,
                {"role": "assistant_analysis", "content": "The user asks."},
                {"role": "assistant_final", "content": "Yes."},
            ]
        },
        ANALYSIS + FINAL,
    ),
    "from and value": (
        {"conversations": [{"from": "human", "value": "Are you there?"}, {"from": "gpt", "value": "Yes."}]},
        FINAL,
    ),
    "thinking": ({"messages": [USER, ANSWER | {"thinking": "The user asks."}]}, ANALYSIS + FINAL),
    "Nemotron v2": (
        {
            "uuid": "a",
            "license": "cc-by-4.0",
            "generator": "gpt-oss-120b",
            "version": "v2",
            "category": "chat",
            "reasoning": "off",
            "messages": [USER | {"tool_calls": []}, ANSWER | {"tool_calls": []}],
        },
        FINAL,
    ),
    "ids that were not recorded": ({"input_ids": None, "loss_mask": None, "messages": [USER, ANSWER]}, FINAL),
}
EMPTY = {"role": "assistant", "content": ""}
OLD = [
    {"from": "human", "value": "One?"},
    {"from": "assistant_analysis", "value": "Old thoughts."},
    {"from": "assistant_final", "value": "First."},
    {"from": "human", "value": "Two?"},
    {"from": "assistant_analysis", "value": "New ones."},
    {"from": "assistant_final", "value": "Second."},
]
OLD_EFFORT = {"from": "assistant_reasoning_effort", "value": "High"}
REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    name: ({"messages": [USER, ANSWER], "date": "2025-08-05"} | columns, begins)
    for name, columns, begins in [
        ("date in words", {"date": "Tuesday"}, "bad_date: date is 'Tuesday', expected YYYY-MM-DD"),
        ("date as a number", {"date": 20250805}, "bad_date: date is a int"),
        ("effort as a number", {"reasoning_effort": 3}, "bad_effort: the reasoning effort is a int"),
        ("effort that is none", {"reasoning_effort": "<|end|>"}, "bad_effort: the reasoning effort is '<|end|>'"),
        ("no text", {"messages": [USER, EMPTY], "truncated": True}, "not_rendered: the truncated answer has no"),
        ("no end", {"messages": None, "conversations": OLD[:5]}, "not_rendered: a message needs role and content"),
        ("no answer", {"messages": [USER]}, "not_rendered: the last message is not the assistant's"),
        ("no prompt", {"messages": [ANSWER]}, "not_rendered: there is no message before the answer"),
        ("unknown role", {"messages": [{"role": "pope", "content": "?"}, ANSWER]}, "not_rendered: the chat"),
        (
            "tool calls",
            {"messages": [USER, EMPTY | {"tool_calls": [{"name": "f"}]}, ANSWER]},
            "not_rendered: a message has tool_calls",
        ),
        (
            "two efforts",
            {"messages": None, "conversations": [OLD_EFFORT, *OLD, OLD_EFFORT | {"value": "low"}]},
            "bad_effort: the conversation has several",
        ),
        (
            "analysis without an answer",
            {"messages": None, "conversations": [*OLD[:2], *OLD[3:]]},
            "not_rendered: an analysis has no final answer",
        ),
    ]
}


def write(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(target: Path, *data: Path, **settings: Any) -> list[Any]:
    config = ExtractConfig(target=str(target), data=tuple(map(str, data)), store="unused", **settings)
    return list(SampleReader(config, open_target(config.target)))


def as_table(path: Path, row: Row) -> Path:
    pq.write_table(pa.Table.from_pylist([dict(row)]), path)
    return path


@pytest.mark.parametrize("name", TOKEN_IDS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_recorded_ids_are_taken_as_they_stand(target: Path, tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    (sample,) = read(target, as_table(path, TOKEN_IDS[name]) if suffix == "parquet" else write(path, [TOKEN_IDS[name]]))
    assert sample.input_ids.tolist() == RECORDED["input_ids"]
    assert sample.loss_mask.tolist() == RECORDED["loss_mask"]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversation_is_prompt_and_sampled_answer(target: Path, tmp_path: Path, name: str, suffix: str) -> None:
    row, answer = CONVERSATIONS[name]
    path = tmp_path / f"rows.{suffix}"
    (sample,) = read(target, as_table(path, row) if suffix == "parquet" else write(path, [row]))
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    sampled = tokenizer(answer, add_special_tokens=False)["input_ids"]
    served = len(sample.input_ids) - len(sampled)
    assert sample.input_ids[served:].tolist() == sampled
    assert tokenizer.decode(sample.input_ids[:served]).endswith("<|end|>" + PROMPT)
    assert sample.loss_mask.tolist() == [0] * served + [1] * len(sampled)
    assert sample.origin.category == row.get("category", "")


@pytest.mark.parametrize("name", REJECTED)
def test_conversation_that_cannot_be_what_was_served_is_rejected(target: Path, tmp_path: Path, name: str) -> None:
    row, begins = REJECTED[name]
    (reject,) = read(target, write(tmp_path / "rows.jsonl", [row]))
    assert isinstance(reject, Reject)
    assert f"{reject.reason}: {reject.detail}".startswith(begins)


def test_shapes_may_be_mixed_in_one_file(target: Path, tmp_path: Path) -> None:
    mixed = [*TOKEN_IDS.values(), *(row for row, _ in CONVERSATIONS.values())]
    samples = read(target, write(tmp_path / "rows.jsonl", mixed))
    assert [sample.origin.row for sample in samples if isinstance(sample, Sample)] == list(range(len(mixed)))


def test_odd_rows_do_not_change_the_others(target: Path, tmp_path: Path) -> None:
    odd: list[Row] = [
        {**RECORDED, "input_ids": [5, 6.5, 7, 8]},
        {**RECORDED, "input_ids": "5678"},
        {**RECORDED, "input_ids": [5, 10**30, 7, 8]},
        {"messages": {"role": "user"}},
        {},
    ]
    path = write(tmp_path / "rows.jsonl", [RECORDED, *odd, RECORDED])
    path.write_text(path.read_text() + '{"input_ids": [5, 6\n')
    rows = read(target, path)
    reasons = ["not_integers", "not_integers", "not_integers", "not_rendered", "empty", "unreadable"]
    assert [row.reason for row in rows if isinstance(row, Reject)] == reasons
    assert [row.origin.row for row in rows if isinstance(row, Sample)] == [0, 6]


def test_chosen_columns_are_read(target: Path, tmp_path: Path) -> None:
    row = {"tokens": [9, 8], "mine": [0, 1], "topic": 7, **RECORDED, "chat": [USER, ANSWER], "category": "other"}
    path = write(tmp_path / "rows.jsonl", [row])
    columns = {"input_ids_column": "tokens", "loss_mask_column": "mine", "category_column": "topic"}
    (sample,) = read(target, path, **columns)
    assert (sample.input_ids.tolist(), sample.loss_mask.tolist(), sample.origin.category) == ([9, 8], [0, 1], "7")
    path = write(tmp_path / "chat.jsonl", [{"chat": [USER, ANSWER], "messages": [USER]}])
    (sample,) = read(target, path, messages_column="chat")
    assert isinstance(sample, Sample)


@pytest.mark.parametrize("setting", ["messages_column", "input_ids_column", "loss_mask_column", "category_column"])
def test_chosen_column_that_is_not_there_is_named(target: Path, tmp_path: Path, setting: str) -> None:
    path = write(tmp_path / "rows.jsonl", [{**RECORDED, "messages": [USER, ANSWER]}])
    message = f"^{path}: unknown columns input_ids, loss_mask, messages; expected .* and the chosen mine[.]$"
    with pytest.raises(DataError, match=message):
        read(target, path, **{setting: "mine"})


def test_typo_in_a_later_argument_is_found_before_the_first_row(target: Path, tmp_path: Path) -> None:
    config = ExtractConfig(
        target=str(target),
        data=(str(write(tmp_path / "rows.jsonl", [RECORDED])), str(tmp_path / "gone.jsonl")),
        store="unused",
    )
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        next(iter(SampleReader(config, open_target(config.target))))


def test_shards_cover_the_rows_once(target: Path, tmp_path: Path) -> None:
    data = [
        write(tmp_path / f"{name}.jsonl", [{**RECORDED, "input_ids": [base, row, 5, 6]} for row in range(size)])
        for name, base, size in (("first", 1, 5), ("second", 2, 8))
    ]

    def ids(**settings: Any) -> list[tuple[int, ...]]:
        return [tuple(sample.input_ids[:2].tolist()) for sample in read(target, *data, **settings)]

    for limit in (None, 9):
        whole = ids(limit=limit)
        assert len(whole) == (limit or 13)
        for count in (1, 3):
            shards = [ids(limit=limit, shard=f"{index}/{count}") for index in range(count)]
            assert shards == [whole[index::count] for index in range(count)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": "4/4"}, "must be i/n with 0 <= i < n, got 4/4"),
        ({"shard": "a/4"}, "must be i/n, such as 0/4, got a/4"),
        ({"shard": "4"}, "must be i/n, such as 0/4, got 4"),
        ({"date": "5 August"}, "must be YYYY-MM-DD, got 5 August"),
    ],
)
def test_setting_that_is_no_shard_or_date_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExtractConfig(target="t", data=("d",), store="s", **settings)


def test_options_of_the_command_reach_the_reader(specx: Any, target: Path, tmp_path: Path) -> None:
    rows = [{"chat": [USER, ANSWER, USER, ANSWER], "topic": name} for name in ("a", "b", "c")]
    path = write(tmp_path / "rows.jsonl", rows)
    result = specx(
        "extract", "--target", target, "--data", path, "--store", tmp_path / "store", "--messages-column", "chat",
        "--category-column", "topic", "--turns", "all", "--shard", "0/2", "--date", "2025-08-05",
        "--reasoning-effort", "low", "--too-long", "truncate", "--max-length", "4000", "--top-k", 4, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    # Two rows of two answers; the second row's are the first's.
    assert (summary["sequences"], summary["reused"], summary["rejected"]) == (2, 2, 0)


def test_every_reason_is_explained_to_users() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \| (?:is|has) ", page, re.MULTILINE)) == set(get_args(Reason))
