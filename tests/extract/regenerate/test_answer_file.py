"""The file of answers: each once and with its settings, whatever a run was killed at. No engine is needed."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from specx.extract.regenerate.answer_file import AnswerFile, AnswersError, AnswerSettings, read_settings
from specx.extract.regenerate.answer_paths import pieces_directory
from specx.extract.regenerate.prompts import RegenerationPrompt
from specx.extract.regenerate.sampler import Answer
from specx.storage.schema import TargetIdentity

SETTINGS = AnswerSettings(
    target=TargetIdentity(architecture="GptOssForCausalLM", config_hash="c", weights_hash="w"),
    dtype="bfloat16",
    temperature=0.7,
    top_p=1.0,
    top_k=0,
    max_new_tokens=8,
    max_length=64,
    seed=0,
    reasoning_effort="low",
    date="2026-01-02",
)


class KilledError(Exception):
    """Stands for the end of a process."""


def answer(row: int, source: str = "prompts.jsonl") -> Answer:
    prompt = RegenerationPrompt(
        source=source,
        row=row,
        identifier=f"r{row}",
        category="chat",
        messages=({"role": "user", "content": f"{row}?"},),
        reasoning_effort="low",
        date="2026-01-02",
        input_ids=np.array([1, 2, row], np.int32),
    )
    return Answer(prompt=prompt, sampled=np.array([row, 9], np.int32), finish_reason="stop")


def opened(out: Path, **changed: Any) -> AnswerFile:
    return AnswerFile(out, SETTINGS.model_copy(update=changed), answers_per_piece=4)


def write(out: Path, rows: Iterable[int], *, finish: bool = True, die_after: int | None = None) -> None:
    with opened(out) as answers:
        for count, row in enumerate(rows):
            if count == die_after:
                raise KilledError
            if ("prompts.jsonl", row) not in answers:
                answers.add(answer(row), f"text {row}")
        if finish:
            answers.finish()


def rows_of(out: Path) -> list[int]:
    return [int(row) for row in pq.read_table(out)["row"].to_pylist()]


def test_what_a_run_had_when_it_ended_is_in_the_file_once(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    with pytest.raises(KilledError):
        write(out, range(30), die_after=11)
    assert not out.exists()
    write(out, range(30))
    assert sorted(rows_of(out)) == list(range(30))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_pieces_that_a_killed_run_had_merged_already_are_not_merged_again(tmp_path: Path) -> None:
    out, saved = tmp_path / "a.parquet", tmp_path / "saved"
    write(out, range(10), finish=False)
    shutil.copytree(pieces_directory(out), saved)
    write(out, range(10))
    # Killed between the file's new name and the end of the directory.
    saved.rename(pieces_directory(out))
    write(out, range(12))
    assert sorted(rows_of(out)) == list(range(12))


def test_half_written_files_of_a_killed_run_are_neither_read_nor_kept(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    write(out, range(5), finish=False)
    (pieces_directory(out) / ".tmp-0-piece.parquet").write_bytes(b"PAR1 half of it")
    (pieces_directory(out) / ".tmp-0-a.parquet").write_bytes(b"PAR1 half of it")
    assert read_settings(out) == SETTINGS
    write(out, range(5))
    assert sorted(rows_of(out)) == list(range(5))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_finished_file_is_added_to_and_keeps_what_it_had(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    write(out, range(6))
    before = pq.read_table(out).to_pylist()
    write(out, range(9))
    assert pq.read_table(out).to_pylist()[:6] == before
    assert sorted(rows_of(out)) == list(range(9))


def test_nothing_new_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    write(out, range(6))
    before = out.stat()
    write(out, range(6))
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("finish", [True, False], ids=["finished", "in pieces"])
def test_other_settings_are_refused_and_named(tmp_path: Path, finish: bool) -> None:
    out = tmp_path / "a.parquet"
    write(out, range(3), finish=finish)
    with pytest.raises(AnswersError, match=r"temperature is 0\.7 in the file, 0\.9 in this run\. Use another --out"):
        opened(out, temperature=0.9)
    with pytest.raises(AnswersError, match=r"weights_hash is w in the file, other in this run"):
        opened(out, target=SETTINGS.target.model_copy(update={"weights_hash": "other"}))
    assert read_settings(out) == SETTINGS


def test_a_run_that_ended_without_an_answer_binds_nobody_to_its_settings(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    with pytest.raises(KilledError):
        write(out, range(3), die_after=0)
    assert list(tmp_path.iterdir()) == []
    with opened(out, temperature=0.9) as answers:
        answers.add(answer(0), "")
    settings = read_settings(out)
    assert settings is not None
    assert settings.temperature == 0.9


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    with opened(out) as answers:
        answers.add(answer(0), "")
        with pytest.raises(AnswersError, match="another run is writing it"), opened(out):
            pass
    write(out, range(2))
    assert sorted(rows_of(out)) == [0, 1]


def test_a_damaged_piece_is_named_with_what_to_do(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    write(out, range(8), finish=False)
    first, second = sorted(pieces_directory(out).glob("*.parquet"))
    second.write_bytes(second.read_bytes()[:-20])
    with pytest.raises(AnswersError, match=rf"{second.name}: .*damaged.* Delete it and rerun"):
        write(out, range(8))
    second.unlink()
    write(out, range(8))
    assert sorted(rows_of(out)) == list(range(8))
    assert not first.exists()


def test_the_same_number_in_two_sources_is_two_rows(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    with opened(out) as answers:
        answers.add(answer(0, "a.jsonl"), "")
        assert ("a.jsonl", 0) in answers
        assert ("b.jsonl", 0) not in answers
        answers.add(answer(0, "b.jsonl"), "")
        answers.finish()
    assert pq.read_table(out)["source"].to_pylist() == ["a.jsonl", "b.jsonl"]
