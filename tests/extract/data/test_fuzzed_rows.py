"""Whatever a row holds, it ends as samples or rejects with a known reason, and none is lost."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specx.extract.config import ExtractConfig
from specx.extract.data.row_formats import Reason
from specx.extract.data.samples import Sample, SampleReader
from specx.extract.data.sources import Row
from specx.extract.target import open_target
from specx.storage.schema import Reject

GOOD = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}
QUICK = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}

# With lone surrogates, which JSON can spell and UTF-8 cannot.
TEXT = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(["", "user", "Yes.", "\ud800"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 2100)
    | st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**40])
    | st.floats()
    | TEXT
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
IDS = st.lists(st.integers(0, 2047), max_size=12) | st.lists(SCALARS, max_size=6) | VALUES
MASKS = st.lists(st.integers(0, 1), max_size=12) | st.lists(SCALARS, max_size=6) | VALUES
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "assistant_final"])
ROLES |= st.sampled_from(["assistant_analysis", "assistant_reasoning_effort"]) | TEXT
MESSAGES = (
    st.fixed_dictionaries(
        {"role": ROLES, "content": TEXT | VALUES}, optional={"thinking": VALUES, "reasoning_content": TEXT}
    )
    | st.fixed_dictionaries({"from": ROLES, "value": TEXT | VALUES}, optional={"tool_calls": VALUES})
    | VALUES
)
ANSWERED = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}), max_size=4
).map(lambda turns: [*turns, {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}])
CONVERSATIONS = ANSWERED | st.lists(MESSAGES, max_size=5) | VALUES
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "input_ids": IDS,
        "loss_mask": MASKS,
        "messages": CONVERSATIONS,
        "conversations": CONVERSATIONS,
        "status": st.sampled_from(["success", None, "success", "error", [], 5]),
        "finish_reason": st.sampled_from(["length", "stop", None]) | VALUES,
        "truncated": VALUES,
        "reasoning_effort": st.sampled_from(["low", "High", None]) | VALUES,
        "date": st.sampled_from(["2025-08-05", None]) | VALUES,
        "category": VALUES,
        "more": VALUES,
    },
)
TALKS = st.fixed_dictionaries(
    {"messages": ANSWERED | st.lists(MESSAGES, min_size=1, max_size=5)},
    optional={"finish_reason": st.just("length"), "reasoning_effort": TEXT, "date": TEXT, "category": TEXT},
)
PAIRS = st.integers(2, 12).flatmap(
    lambda size: st.fixed_dictionaries({
        "input_ids": st.lists(st.integers(0, 2050), min_size=size, max_size=size),
        "loss_mask": st.lists(st.integers(0, 1), min_size=size, max_size=size),
    })
)  # fmt: skip
TABLE_VALUES = st.binary(max_size=4) | st.dates() | st.datetimes() | st.decimals() | st.tuples(SCALARS, SCALARS)
COLUMNS = st.sampled_from(["input_ids", "loss_mask", "messages", "conversations", "date", "category", "status"])


def reader(target: Path, path: Path, **chosen: Any) -> SampleReader:
    config = ExtractConfig(target=str(target), data=(str(path),), store="unused", max_length=500, **chosen)
    return SampleReader(config, open_target(config.target))


@pytest.fixture(scope="module")
def readers(target: Path) -> list[SampleReader]:
    return [reader(target, Path("unused"), turns=turns) for turns in ("last", "all")]


def assert_sound(result: Sample | Reject, number: int) -> None:
    if isinstance(result, Reject):
        assert result.row == number
        assert result.reason in get_args(Reason)
        assert result.detail
        assert "\n" not in result.detail.encode().decode()
        return
    assert result.origin.row == number
    result.origin.category.encode()
    ids, mask = result.input_ids, result.loss_mask
    assert (ids.dtype, mask.dtype, ids.ndim) == (np.int32, np.uint8, 1)
    assert ids.shape == mask.shape
    assert 2 <= len(ids) <= 500
    assert 0 <= ids.min() <= ids.max() < 2048
    assert set(mask.tolist()) in ({1}, {0, 1})


@settings(max_examples=500, **QUICK)
@given(columns=ROWS | PAIRS | TALKS | st.tuples(ROWS, PAIRS).map(lambda two: two[0] | two[1]))
def test_row_of_anything_ends_as_samples_or_rejects(readers: list[SampleReader], columns: Mapping[str, Any]) -> None:
    last, every = (list(one.convert(Row(source="rows", number=7, columns=columns))) for one in readers)
    assert len(last) == 1
    assert every
    for result in [*last, *every]:
        assert_sound(result, 7)


@settings(max_examples=100, **QUICK)
@given(columns=st.tuples(ROWS, st.dictionaries(COLUMNS, TABLE_VALUES, min_size=1)).map(lambda two: two[0] | two[1]))
def test_row_of_a_table_ends_as_samples_or_rejects(readers: list[SampleReader], columns: Mapping[str, Any]) -> None:
    for one in readers:
        for result in one.convert(Row(source="rows", number=7, columns=columns)):
            assert_sound(result, 7)


@settings(max_examples=10, **QUICK)
@given(rows=st.lists(ROWS | PAIRS | TALKS | VALUES, min_size=50, max_size=50))
def test_lines_of_anything_end_as_samples_or_rejects(
    tmp_path_factory: pytest.TempPathFactory, target: Path, rows: list[Any]
) -> None:
    path = tmp_path_factory.mktemp("fuzzed") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [GOOD, *rows]))
    results = list(reader(target, path))
    assert len(results) == 51
    for number, result in enumerate(results):
        assert_sound(result, number)
    by_shard = [result for index in range(3) for result in reader(target, path, shard=f"{index}/3")]
    assert len(by_shard) == 51
    assert sum(isinstance(result, Sample) for result in by_shard) == sum(isinstance(row, Sample) for row in results)
