"""Rows come from files, directories, patterns and declared splits, each with its source and number."""

import datetime
import gzip
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specx.extract.data.sources import DataError, Row, find_sources, rows

Columns = Mapping[str, Any]

GOOD: Columns = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}
CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - split: chat
    path: main/chat.{suffix}
  - split: math
    path: main/math-*.{suffix}
- config_name: more
  data_files:
  - split: train
    path: more/train.{suffix}
---
"""


def write(path: Path, found: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = list(found)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(line) for line in lines]), path)
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(argument: str | Path) -> list[Row]:
    return [
        row
        for source in find_sources(str(argument))
        for row in rows(source, lambda columns: "input_ids" in columns, "input_ids")
    ]


def numbered(found: Iterable[Row]) -> list[tuple[str, int, Any]]:
    return [(row.source, row.number, row.columns.get("input_ids")) for row in found]


@pytest.fixture(params=["parquet", "jsonl"])
def declared(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory like a data set's on the hub: a card that declares configurations and splits."""
    directory = tmp_path / "declared"
    for index, name in enumerate(["main/chat", "main/math-0", "main/math-1", "more/train"]):
        write(directory / f"{name}.{request.param}", [{**GOOD, "input_ids": [index, index, row]} for row in range(2)])
    (directory / "README.md").write_text(CARD.format(suffix=request.param))
    return directory


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_rows_of_a_file_are_read_in_order(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}", [{**GOOD, "input_ids": [row]} for row in range(2500)])
    assert numbered(read(path)) == [(str(path), row, [row]) for row in range(2500)]


def test_compressed_lines_are_read(tmp_path: Path) -> None:
    for name in ("rows.jsonl.gz", "rows.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(json.dumps(GOOD).encode()))
        assert numbered(read(tmp_path / name)) == [(str(tmp_path / name), 0, [5, 6, 7])]


def test_json_file_may_be_one_array_of_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([GOOD, 5, GOOD], indent=1))
    first, second, third = read(tmp_path / "rows.json")
    assert first.columns == third.columns == GOOD
    assert second.unreadable == "a row is a JSON object, found int"


def test_files_of_a_directory_are_read_in_sorted_order(tmp_path: Path) -> None:
    for index, name in enumerate(["b.parquet", "a/z.jsonl", "a/y.json", ".cache/x.jsonl"]):
        write(tmp_path / "data" / name, [{**GOOD, "input_ids": [index]}] * 2)
    (tmp_path / "data" / "README.md").write_text("nothing to read")
    expected = [("a/y.json", 2), ("a/z.jsonl", 1), ("b.parquet", 0)]
    assert numbered(read(tmp_path / "data")) == [
        (str(tmp_path / "data" / name), row, [index]) for name, index in expected for row in range(2)
    ]


def test_files_of_a_pattern_are_read_in_sorted_order(tmp_path: Path) -> None:
    for index, name in enumerate(["c.jsonl", "a.jsonl", "b.json", "deep/d.jsonl"]):
        write(tmp_path / name, [{**GOOD, "input_ids": [index]}])
    assert [row.columns["input_ids"] for row in read(f"{tmp_path}/*.jsonl")] == [[1], [0]]
    assert [row.columns["input_ids"] for row in read(f"{tmp_path}/**/*.jsonl")] == [[1], [0], [3]]


def test_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows[1]*.parquet", [GOOD])
    assert numbered(read(path)) == [(str(path), 0, [5, 6, 7])]


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ("chat", [("chat", 0, [0, 0, 0]), ("chat", 1, [0, 0, 1])]),
        ("main/math", [("main/math", row, [1 + row // 2, 1 + row // 2, row % 2]) for row in range(4)]),
        ("more/train", [("more/train", 0, [3, 3, 0]), ("more/train", 1, [3, 3, 1])]),
    ],
)
def test_declared_splits_are_read(declared: Path, splits: str, expected: list[tuple[str, int, list[int]]]) -> None:
    found = numbered(read(f"{declared}:{splits}"))
    assert found == [(f"{declared}:{name}", number, ids) for name, number, ids in expected]


def test_several_splits_are_sources_of_their_own(declared: Path) -> None:
    assert [source.name for source in find_sources(f"{declared}:math,chat")] == [f"{declared}:math", f"{declared}:chat"]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ("nope", "no split nope; name some of chat, math, as in .*declared:chat"),
        ("chat,nope", "no split chat,nope; name some of chat, math"),
        ("nope/chat", "no configuration nope; name one of main, more, as in .*declared:main/SPLIT"),
    ],
)
def test_unknown_split_names_those_that_exist(declared: Path, splits: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_sources(f"{declared}:{splits}")


def test_configuration_is_asked_for_where_there_is_no_default(declared: Path) -> None:
    card = declared / "README.md"
    card.write_text(card.read_text().replace("  default: true\n", ""))
    with pytest.raises(DataError, match="it has several configurations; name one of main, more"):
        find_sources(f"{declared}:chat")


@pytest.mark.parametrize("argument", ["org/name", "org/name:train", "org/name:config/train,test"])
def test_hub_that_is_not_reached_is_said_in_one_line(argument: str) -> None:
    with pytest.raises(DataError, match=f"^{argument}: no such file, and the hub cannot be reached: [^\n]*$"):
        find_sources(argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("gone.jsonl", "no such file"),
        ("gone/rows.parquet", "no such file"),
        ("gone", "no such file"),
        ("/gone/directory:train", "no such file"),
        ("", "no such file"),
        ("gone*.jsonl", "no file matches this pattern"),
    ],
)
def test_argument_that_names_nothing_is_refused(argument: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_sources(argument)


def test_directory_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"no data files in it, expected some that end in \.parquet, \.jsonl"):
        find_sources(str(tmp_path))


def test_one_line_that_is_no_row_does_not_end_the_others(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    lines = [b'{"input_ids": [1,', good, b"[1, 2]", b"", b'{"text": "\xff"}', b"[" * 100_000, good]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    found = read(tmp_path / "rows.jsonl")
    assert [row.number for row in found] == list(range(6))
    assert [bool(row.unreadable) for row in found] == [True, False, True, True, True, False]
    assert found[0].unreadable.startswith("JSON parse error: Expecting value: line 1 column 18")
    assert found[2].unreadable == "a row is a JSON object, found list"
    assert found[3].unreadable.startswith("'utf-8' codec can't decode")
    assert found[4].unreadable.startswith("JSON parse error: ")


def test_odd_value_changes_no_other_row(tmp_path: Path) -> None:
    odd: list[Columns] = [{"input_ids": [1.5, 2]}, {"input_ids": "text"}, {"input_ids": {"a": None}}]
    path = write(tmp_path / "rows.jsonl", [GOOD, *odd, GOOD])
    assert [row.columns for row in read(path)] == [GOOD, *odd, GOOD]


def test_file_of_bad_lines_is_taken_for_something_else(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("no\n" * 200 + json.dumps(GOOD))
    with pytest.raises(DataError, match=r"rows\.jsonl: row 0 cannot be read: JSON parse error"):
        read(tmp_path / "rows.jsonl")


def test_columns_that_nobody_reads_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": 1, "answer": 2}] * 3)
    with pytest.raises(DataError, match="unknown columns answer, prompt; expected input_ids"):
        read(path)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_compressed_file_is_named(tmp_path: Path, damage: str) -> None:
    content = bytearray(gzip.compress("".join(json.dumps({"input_ids": [row]}) + "\n" for row in range(9999)).encode()))
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2 : len(content) // 2 + 50] = b"\xff" * 50
    (tmp_path / "rows.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: row \d+ cannot be read: "):
        read(tmp_path / "rows.jsonl.gz")


def test_typed_columns_of_a_table_are_pythons(tmp_path: Path) -> None:
    table = pa.table({
        "input_ids": pa.array([[1, 2]], pa.large_list(pa.int32())),
        "date": pa.array([datetime.date(2025, 8, 5)]),
        "messages": pa.array([[{"role": "user", "content": None}]]),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "rows.parquet")
    (row,) = read(tmp_path / "rows.parquet")
    assert row.columns["input_ids"] == [1, 2]
    assert row.columns["messages"] == [{"role": "user", "content": None}]
    assert row.columns["date"] == datetime.date(2025, 8, 5)


def test_copy_of_a_data_set_is_read_like_the_data_set(declared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(declared, tmp_path / "copy"))
    assert [row.columns for row in read(copy)] == [
        row.columns for splits in ("chat,math", "more/train") for row in read(f"{declared}:{splits}")
    ]
