"""Rows -> prompts: which data is read, and what a run's settings may ask of it. No engine is needed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from specx.config import ConfigError, load_config
from specx.extract.data.sources import DataError
from specx.extract.regenerate.answer_paths import pieces_directory
from specx.extract.regenerate.config import RegenerateConfig
from specx.extract.regenerate.prompts import PromptReader, RegenerationPrompt
from specx.extract.target import open_target
from specx.storage.schema import Reject

DATE = "2026-01-02"
ROW = {"messages": [{"role": "user", "content": "Are you there?"}]}


def reader(target: Path, data: list[Path | str], out: Path, **settings: Any) -> PromptReader:
    config = RegenerateConfig(target=str(target), data=tuple(map(str, data)), out=str(out), **settings)
    return PromptReader(config, open_target(str(target)), DATE)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(found: PromptReader) -> list[RegenerationPrompt]:
    result = list(found)
    assert all(isinstance(each, RegenerationPrompt) for each in result), result
    return [each for each in result if isinstance(each, RegenerationPrompt)]


def test_a_file_named_twice_is_read_once(target: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", ROW, ROW)
    found = prompts(reader(target, [data, str(tmp_path / "*.jsonl")], tmp_path / "out.parquet"))
    assert [(each.source, each.row) for each in found] == [(str(data), 0), (str(data), 1)]


def test_what_a_run_writes_among_its_prompts_is_not_read(target: Path, tmp_path: Path, regen: Path) -> None:
    write(tmp_path / "a.jsonl", ROW)
    out = tmp_path / "out.parquet"
    pieces_directory(out).mkdir()
    for path in (out, tmp_path / "out.rejects.parquet", pieces_directory(out) / "piece.parquet"):
        shutil.copyfile(regen / "dev.parquet", path)
    assert [each.source for each in prompts(reader(target, [tmp_path], out))] == [str(tmp_path / "a.jsonl")]
    with pytest.raises(DataError, match=r"nothing but this run's own output\. Give --out another place"):
        reader(target, [out], out)


def test_effort_and_date_of_a_row_win_over_the_runs(target: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", ROW, {**ROW, "reasoning_effort": "High", "date": "2025-12-31"})
    found = prompts(reader(target, [data], tmp_path / "out.parquet", reasoning_effort="low"))
    assert [(each.reasoning_effort, each.date) for each in found] == [("low", DATE), ("high", "2025-12-31")]
    assert found[0].input_ids.tolist() != found[1].input_ids.tolist()


def test_reasoning_of_earlier_answers_and_the_last_answer_are_not_served(target: Path, tmp_path: Path) -> None:
    question = {"role": "user", "content": "Are you there?"}
    earlier = {"role": "assistant", "content": "Yes."}
    last = {"role": "assistant", "content": "Still.", "thinking": "Am I?"}
    data = write(
        tmp_path / "a.jsonl",
        {"messages": [question, {**earlier, "thinking": "He asks."}, question, last]},
        {"messages": [question, earlier, question]},
    )
    found = prompts(reader(target, [data], tmp_path / "out.parquet"))
    assert found[0].input_ids.tolist() == found[1].input_ids.tolist()
    assert [list(each.messages) for each in found] == [[question, earlier, question]] * 2


def test_recorded_ids_win_over_the_text_beside_them(target: Path, tmp_path: Path, regen: Path) -> None:
    row = pq.read_table(regen / "dev.parquet").slice(0, 1).to_pylist()[0]
    row["messages"] = [{"role": "user", "content": "Something else."}]
    (found,) = prompts(reader(target, [write(tmp_path / "a.jsonl", row)], tmp_path / "out.parquet"))
    assert found.input_ids.tolist() == row["input_ids"][: row["loss_mask"].index(1)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "assistant", "content": "Hello."}]}, "not_rendered"),
        ({"messages": [{"role": "user", "content": None}]}, "not_rendered"),
        ({"messages": "Hello."}, "not_rendered"),
        ({"messages": []}, "empty"),
        ({"messages": ROW["messages"], "date": "yesterday"}, "bad_date"),
        ({"messages": ROW["messages"], "reasoning_effort": 3}, "bad_effort"),
        ({"messages": [{"role": "user", "content": "whale " * 5000}]}, "too_long"),
        ({"input_ids": [5, 6], "loss_mask": [1, 1]}, "empty"),
        ({"input_ids": [5, 6, 7], "loss_mask": [0, 1]}, "mask_length"),
        ({"input_ids": [5, 99999, 6], "loss_mask": [0, 0, 1]}, "id_out_of_range"),
    ],
)
def test_a_row_that_gives_no_prompt_is_rejected_with_its_reason(
    target: Path, tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    found = list(reader(target, [write(tmp_path / "a.jsonl", ROW, row)], tmp_path / "out.parquet"))
    assert isinstance(found[0], RegenerationPrompt)
    assert isinstance(found[1], Reject)
    assert (found[1].row, found[1].reason) == (1, reason)


def test_an_effort_that_the_template_does_not_know_is_refused(target: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(target, tmp_path / "target"))
    (plain / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    data = write(tmp_path / "a.jsonl", ROW)
    with pytest.raises(ConfigError, match=r"its chat template knows no reasoning effort\. Leave --reasoning-effort"):
        reader(plain, [data], tmp_path / "out.parquet", reasoning_effort="low")
    (found,) = prompts(reader(plain, [data], tmp_path / "out.parquet"))
    assert (found.reasoning_effort, found.date) == (None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reasoning_effort": "hgih"}, r"\(reasoning_effort\): Input should be 'low', 'medium' or 'high'"),
        ({"date": "today"}, r"\(date\): must be YYYY-MM-DD, got today"),
        ({"out": "answers"}, r"\(out\): must be a local file that ends in \.parquet, got answers"),
        ({"out": "s3://bucket/a.parquet"}, r"\(out\): must be a local file"),
        ({"temperature": -1}, r"\(temperature\): Input should be greater than or equal to 0"),
        ({"top_p": 0}, r"\(top_p\): Input should be greater than 0"),
        ({"max_new_tokens": 0}, r"\(max_new_tokens\): Input should be greater than or equal to 1"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RegenerateConfig, None, {"target": "t", "data": ["d"], "out": "o.parquet", **settings})
