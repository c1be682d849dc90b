"""Every sequence ends in the store exactly once, whatever kills, fills or races the writers."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import specx.storage
from specx.storage.catalog.sequence_id import sequence_id
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.schema import DatasetInfo, Origin, Reject, SequenceFeatures
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter

Fill = Callable[..., FeatureStore]
Sequence = Callable[[int], SequenceFeatures]
OriginOf = Callable[[int], Origin]
Start = Callable[..., subprocess.Popen[str]]


class KilledError(Exception):
    """Stands for whatever ends a run."""


def part_names(path: Path) -> set[str]:
    return {part.name for part in (path / "parts").iterdir()}


def named_parts(path: Path) -> set[str]:
    return {record.part for record in FeatureStore.open(path).records.values()}


def test_a_unit_is_committed_once_it_is_full_and_the_last_one_at_the_end(
    tmp_path: Path, fill: Fill, expect_exactly: Callable[[str | Path, int], None]
) -> None:
    store = fill(tmp_path / "store", 9, tokens_per_part=200)
    tokens = [sum(record.sequences.lengths) for record in store.records.values()]
    assert len(tokens) > 2
    assert all(count >= 200 for count in tokens[:-1])
    expect_exactly(tmp_path / "store", 9)


def test_a_unit_is_absent_until_it_is_committed(
    tmp_path: Path, info: DatasetInfo, sequence: Sequence, origin: OriginOf
) -> None:
    store = FeatureStore.create(tmp_path / "store", info)
    with FeatureWriter(store, tokens_per_part=10_000) as writer:
        writer.add(sequence(0), origin(0))
        assert sequence_id(sequence(0).input_ids) in writer
        assert len(FeatureStore.open(tmp_path / "store").catalogue()) == 0
        writer.commit()
        assert len(FeatureStore.open(tmp_path / "store").catalogue()) == 1


def test_an_exception_keeps_the_units_committed_and_nothing_of_the_one_in_progress(
    tmp_path: Path,
    info: DatasetInfo,
    sequence: Sequence,
    origin: OriginOf,
    expect_exactly: Callable[[str | Path, int], None],
) -> None:
    path = tmp_path / "store"
    store = FeatureStore.create(path, info)

    def write_five_and_die() -> None:
        with FeatureWriter(store, tokens_per_part=10_000) as writer:
            for i in range(5):
                writer.add(sequence(i), origin(i))
                if i == 2:
                    writer.commit()
            raise KilledError

    with pytest.raises(KilledError):
        write_five_and_die()
    expect_exactly(path, 3)
    assert part_names(path) == named_parts(path)


def test_a_reopened_writer_skips_what_is_committed(
    tmp_path: Path, fill: Fill, sequence: Sequence, origin: OriginOf, expect_exactly: Callable[[str | Path, int], None]
) -> None:
    path = tmp_path / "store"
    fill(path, 4, tokens_per_part=100)
    before = named_parts(path)
    with FeatureWriter(FeatureStore.open(path), tokens_per_part=100) as writer:
        for i in range(7):
            assert (sequence_id(sequence(i).input_ids) in writer) == (i < 4)
            writer.add(sequence(i), origin(i))
    assert writer.committed_sequences == 3
    assert writer.committed_tokens == sum(len(sequence(i).input_ids) for i in range(4, 7))
    assert before < named_parts(path)
    expect_exactly(path, 7)


def test_a_rerun_with_nothing_new_writes_nothing(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path / "store", 4, tokens_per_part=100)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*")}
    fill(tmp_path / "store", 4, tokens_per_part=100)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*")} == before


def test_a_sequence_added_twice_to_one_unit_is_kept_once(
    tmp_path: Path,
    info: DatasetInfo,
    sequence: Sequence,
    origin: OriginOf,
    expect_exactly: Callable[[str | Path, int], None],
) -> None:
    store = FeatureStore.create(tmp_path / "store", info)
    with FeatureWriter(store, tokens_per_part=10_000) as writer:
        for i in (0, 1, 0, 1, 2):
            writer.add(sequence(i), origin(i))
    expect_exactly(tmp_path / "store", 3)


def test_a_deleted_commit_is_extracted_again_under_a_new_number(
    tmp_path: Path, fill: Fill, expect_exactly: Callable[[str | Path, int], None]
) -> None:
    store = fill(tmp_path / "store", 7, tokens_per_part=150)
    last = max(store.records)
    Path(store.commit_path(0)).unlink()
    assert sorted(fill(tmp_path / "store", 7, tokens_per_part=150).records) == [*range(1, last + 1), last + 1]
    expect_exactly(tmp_path / "store", 7)


def test_the_record_lists_origins_and_rejects_of_its_unit(
    tmp_path: Path, info: DatasetInfo, sequence: Sequence, origin: OriginOf
) -> None:
    reject = Reject(source="first.jsonl", row=9, reason="too_long", detail="9000 tokens, at most 4096")
    store = FeatureStore.create(tmp_path / "store", info)
    with FeatureWriter(store, tokens_per_part=10_000) as writer:
        writer.add(sequence(3), origin(3))
        writer.reject(reject)
        writer.commit()
        writer.add(sequence(4), origin(4))
    first, second = (FeatureStore.open(tmp_path / "store").records[unit] for unit in (0, 1))
    assert first.sequences.rows == (3,)
    assert first.sequences.sources == (origin(3).source,)
    assert first.rejected == (reject,)
    assert second.rejected == ()


def test_a_writer_tells_each_sequence_it_committed_once(
    tmp_path: Path, info: DatasetInfo, fill: Fill, sequence: Sequence, origin: OriginOf
) -> None:
    fill(tmp_path / "store", 2, tokens_per_part=50)
    names = [sequence_id(sequence(i).input_ids) for i in range(5)]
    with FeatureWriter(FeatureStore.open(tmp_path / "store"), tokens_per_part=10_000) as writer:
        for i in range(4):
            writer.add(sequence(i), origin(i))
        assert writer.take_committed() == []
        writer.commit()
        assert writer.take_committed() == names[2:4]
        assert writer.take_committed() == []
        writer.add(sequence(4), origin(4))
    assert writer.take_committed() == names[4:]


@pytest.mark.parametrize("is_shared", [False, True], ids=["own_store_objects", "one_store_object"])
@pytest.mark.parametrize("tokens_per_part", [60, 200, 10_000])
def test_two_writers_of_overlapping_sequences_end_with_each_once(
    tmp_path: Path,
    info: DatasetInfo,
    sequence: Sequence,
    origin: OriginOf,
    expect_exactly: Callable[[str | Path, int], None],
    tokens_per_part: int,
    is_shared: bool,
) -> None:
    path = tmp_path / "store"
    store = FeatureStore.create(path, info)
    other = store if is_shared else FeatureStore.open(path)
    with (
        FeatureWriter(store, tokens_per_part=tokens_per_part) as first,
        FeatureWriter(other, tokens_per_part=2 * tokens_per_part) as second,
    ):
        for i in range(10):
            first.add(sequence(i), origin(i))
            second.add(sequence(11 - i), origin(11 - i))
    assert first.committed_sequences + second.committed_sequences == 12
    expect_exactly(path, 12)
    assert part_names(path) == named_parts(path)


def test_a_writer_that_lost_everything_to_another_commits_nothing(
    tmp_path: Path,
    info: DatasetInfo,
    sequence: Sequence,
    origin: OriginOf,
    expect_exactly: Callable[[str | Path, int], None],
) -> None:
    path = tmp_path / "store"
    with FeatureWriter(FeatureStore.create(path, info), tokens_per_part=10_000) as loser:
        for i in range(3):
            loser.add(sequence(i), origin(i))
        with FeatureWriter(FeatureStore.open(path), tokens_per_part=10_000) as winner:
            for i in range(3):
                winner.add(sequence(i), origin(i))
    assert (winner.committed_sequences, loser.committed_sequences) == (3, 0)
    expect_exactly(path, 3)
    assert part_names(path) == named_parts(path)


RACE = """
path, backwards = sys.argv[1], sys.argv[2] == "1"
print("ready", flush=True)
sys.stdin.readline()
store = made["FeatureStore"].create(path, made["INFO"])
with made["FeatureWriter"](store, tokens_per_part=150) as writer:
    for i in reversed(range(24)) if backwards else range(24):
        writer.add(made["sequence"](i), made["origin"](i))
print(writer.committed_sequences)
"""


def test_two_processes_racing_from_an_empty_directory_end_with_each_sequence_once(
    tmp_path: Path, start: Start, expect_exactly: Callable[[str | Path, int], None]
) -> None:
    path = tmp_path / "store"
    racers = [start(RACE, path, int(backwards)) for backwards in (False, True)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    results = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        out, errors = racer.communicate(timeout=300)
        assert racer.returncode == 0, errors
        results.append(int(out))
    assert sum(results) == 24
    expect_exactly(path, 24)
    assert part_names(path) == named_parts(path)


KILLED = """
import os, signal
store = made["FeatureStore"].create(sys.argv[1], made["INFO"])
with made["FeatureWriter"](store, tokens_per_part=10_000) as writer:
    for i in range(6):
        writer.add(made["sequence"](i), made["origin"](i))
        if i == 3:
            writer.commit()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_the_unit_in_progress_and_no_other(
    tmp_path: Path, start: Start, fill: Fill, expect_exactly: Callable[[str | Path, int], None]
) -> None:
    path = tmp_path / "store"
    killed = start(KILLED, path)
    _, errors = killed.communicate(timeout=300)
    assert killed.returncode == -9, errors
    expect_exactly(path, 4)
    leftovers = verify(FeatureStore.open(path)).unreferenced
    assert leftovers == [f"parts/{name}" for name in sorted(part_names(path) - named_parts(path))]
    assert len(leftovers) == 1
    fill(path, 8, tokens_per_part=10_000)
    expect_exactly(path, 8)


FULL = """
import json, resource
from specx.storage.errors import StoreFullError
path, at_the_end = sys.argv[1], sys.argv[2] == "1"
store = made["FeatureStore"].create(path, made["INFO"])
# Stands for a full disk: no file may grow past 8 KB, as those of the third sequence would.
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    with made["FeatureWriter"](store, tokens_per_part=10_000 if at_the_end else 50) as writer:
        writer.add(made["make_features"](50, 0), made["origin"](0))
        writer.commit()
        writer.add(made["make_features"](60, 1), made["origin"](1))
        writer.commit()
        writer.add(made["make_features"](2000, 2), made["origin"](2))
except StoreFullError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("at_the_end", [False, True], ids=["while_adding", "while_committing_the_last"])
def test_a_full_disk_is_one_clear_line_and_keeps_what_was_committed(
    tmp_path: Path,
    start: Start,
    at_the_end: bool,
    make_features: Callable[[int, int], SequenceFeatures],
    origin: OriginOf,
    assert_same: Callable[..., None],
) -> None:
    path = tmp_path / "store"
    out, errors = start(FULL, path, int(at_the_end)).communicate(timeout=300)
    assert out, errors
    message = json.loads(out)
    assert message.startswith(f"{path}: file too large while writing. What was finished before is kept: free some")
    assert "\n" not in message
    assert len(FeatureStore.open(path).catalogue()) == 2
    assert verify(FeatureStore.open(path)).problems == []
    # The room the unit in progress took is given back.
    assert part_names(path) == named_parts(path)
    rows = [make_features(length, i) for i, length in enumerate((50, 60, 2000))]
    with FeatureWriter(FeatureStore.open(path), tokens_per_part=50) as writer:
        for i, features in enumerate(rows):
            writer.add(features, origin(i))
    assert writer.committed_sequences == 1
    reader = FeatureReader(FeatureStore.open(path))
    for i, features in enumerate(rows):
        assert_same(reader.features(i), features)


@contextmanager
def interrupted_at(step: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the n-th step into, out of, or between calls of the store's code."""
    package = specx.storage.__path__[0]
    count = [0]

    def at_each_step(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename.startswith(package):
            count[0] += 1
            if count[0] == step:
                raise KeyboardInterrupt

    sys.setprofile(at_each_step)
    try:
        yield count
    finally:
        sys.setprofile(None)


# An interrupt between opening a file and the block that closes it leaves it to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_step_of_a_commit_leaves_a_sound_store(
    tmp_path: Path,
    info: DatasetInfo,
    fill: Fill,
    sequence: Sequence,
    origin: OriginOf,
    expect_exactly: Callable[[str | Path, int], None],
) -> None:
    def commit_one(path: Path, step: int) -> int:
        store = FeatureStore.create(path, info)
        with FeatureWriter(store, tokens_per_part=10_000) as writer:
            writer.add(sequence(0), origin(0))
            with interrupted_at(step) as count:
                writer.commit()
        return count[0]

    steps = commit_one(tmp_path / "whole", 0)
    outcomes = set()
    # The record is published in the last 100 steps; of the many before, that write the part, a few are enough.
    for step in [*range(1, steps - 100, 150), *range(steps - 100, steps, 4)]:
        path = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            commit_one(path, step)
        store = FeatureStore.open(path)
        outcomes.add(len(store.records))
        assert verify(store).problems == [], step
        if step % 4 == 0:
            fill(path, 2, tokens_per_part=10_000)
            expect_exactly(path, 2)
    assert outcomes == {0, 1}
