"""A store on S3, over a network that loses requests and answers: nothing lost, nothing twice, no wrong byte."""

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest

from specx.storage.backends.retry import Retry
from specx.storage.catalog.rejects import RejectLog, read_rejects
from specx.storage.errors import StoreError
from specx.storage.ops.info import summary
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.schema import DatasetInfo, Origin, Reject, SequenceFeatures
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter

from ..objects import bucket, keys, place

Fill = Callable[..., FeatureStore]
Sequence = Callable[[int], SequenceFeatures]
OriginOf = Callable[[int], Origin]
ExpectExactly = Callable[[str, int], None]
Start = Callable[..., subprocess.Popen[str]]


@pytest.mark.parametrize("codec", ["lossless", "none"])
def test_what_is_written_is_what_is_read(s3: str, fill: Fill, expect_exactly: ExpectExactly, codec: str) -> None:
    store = fill(f"{s3}/some/store", 7, 200, codec=codec)
    assert len(store.records) == 3
    assert store.root == f"{s3}/some/store"
    expect_exactly(f"{s3}/some/store", 7)
    assert verify(store).unreferenced == []


def test_a_whole_bucket_can_be_a_store(s3: str, fill: Fill, expect_exactly: ExpectExactly) -> None:
    fill(s3, 2, tokens_per_part=50)
    expect_exactly(f"{s3}/", 2)


def test_parts_and_layout_are_those_of_a_local_store(s3: str, tmp_path: Path, fill: Fill) -> None:
    local, remote = fill(tmp_path / "store", 5, tokens_per_part=200), fill(f"{s3}/store", 5, tokens_per_part=200)
    for unit, record in local.records.items():
        assert record.objects == remote.records[unit].objects
        assert record.sequences == remote.records[unit].sequences
    parts = {
        f"store/{remote.part_key(record)}/{one.key}" for record in remote.records.values() for one in record.objects
    }
    commits = {f"store/{remote.commit_key(unit)}" for unit in remote.records}
    assert set(keys(s3)) == parts | commits | {"store/dataset.json"}


def test_a_large_file_is_written_and_read_in_pieces(s3: str) -> None:
    content = np.random.default_rng(0).bytes(40 << 20)
    written = place(s3)
    tree = written.begin_tree("parts/tree")
    (tree / "c").mkdir(parents=True)
    (tree / "c" / "0").write_bytes(content)
    (tree / "empty").touch()
    written.put_tree("parts/tree")
    with place(s3).local_tree("parts/tree") as path:
        assert (path / "c" / "0").read_bytes() == content
        assert (path / "empty").read_bytes() == b""


def test_a_name_that_begins_like_a_store_is_another_one(s3: str, fill: Fill, info: DatasetInfo) -> None:
    fill(f"{s3}/store", 2, tokens_per_part=50)
    other = FeatureStore.create(f"{s3}/sto", info)
    assert other.records == {}
    assert FeatureStore.create(f"{s3}/store2", info).place.names("") == ["dataset.json"]


def test_what_others_committed_is_seen_and_never_written_again(
    s3: str, fill: Fill, expect_exactly: ExpectExactly
) -> None:
    reader = fill(f"{s3}/store", 2, tokens_per_part=50)
    fill(f"{s3}/store", 4, tokens_per_part=50)
    before = keys(s3)
    fill(f"{s3}/store", 4, tokens_per_part=50)
    assert keys(s3) == before
    reader.refresh()
    assert len(reader.catalogue()) == 4
    expect_exactly(f"{s3}/store", 4)


@pytest.mark.parametrize("tokens_per_part", [60, 10_000])
def test_two_writers_of_overlapping_sequences_end_with_each_once(
    s3: str,
    info: DatasetInfo,
    sequence: Sequence,
    origin: OriginOf,
    expect_exactly: ExpectExactly,
    tokens_per_part: int,
) -> None:
    url = f"{s3}/store"
    with (
        FeatureWriter(FeatureStore.create(url, info), tokens_per_part=tokens_per_part) as first,
        FeatureWriter(FeatureStore.create(url, info), tokens_per_part=2 * tokens_per_part) as second,
    ):
        for i in range(8):
            first.add(sequence(i), origin(i))
            second.add(sequence(9 - i), origin(9 - i))
    assert first.committed_sequences + second.committed_sequences == 10
    assert len({*first.take_committed(), *second.take_committed()}) == 10
    expect_exactly(url, 10)
    # Whoever lost a race has taken its part away.
    assert verify(FeatureStore.open(url)).unreferenced == []


RACE = """
store = made["FeatureStore"].create(sys.argv[1], made["INFO"])
print("ready", flush=True)
sys.stdin.readline()
with made["FeatureWriter"](store, tokens_per_part=150) as writer:
    for i in reversed(range(16)) if sys.argv[2] == "1" else range(16):
        writer.add(made["sequence"](i), made["origin"](i))
print(writer.committed_sequences)
"""


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_two_processes_at_once_end_with_each_sequence_once(
    s3: str, s3_faults: Any, start: Start, expect_exactly: ExpectExactly, share: float
) -> None:
    racers = [start(RACE, f"{s3}/store", int(backwards)) for backwards in (False, True)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n", racer.communicate()[1]
    s3_faults.lose(share, seed=0)
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    committed = 0
    for racer in racers:
        out, errors = racer.communicate(timeout=120)
        assert racer.returncode == 0, errors
        committed += int(out)
    assert committed == 16
    assert bool(s3_faults.lost) == bool(share)
    s3_faults.stop()
    expect_exactly(f"{s3}/store", 16)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_lost_writes_and_answers_lose_and_duplicate_nothing(
    s3: str,
    s3_faults: Any,
    info: DatasetInfo,
    sequence: Sequence,
    origin: OriginOf,
    expect_exactly: ExpectExactly,
    share: float,
    seed: int,
) -> None:
    url = f"{s3}/store"
    committed: list[bytes] = []
    unreported = 0
    s3_faults.lose(share, seed)

    def write() -> None:
        store = FeatureStore.create(place(url), info)
        with FeatureWriter(store, tokens_per_part=200) as writer:
            try:
                for i in range(12):
                    writer.add(sequence(i), origin(i))
                writer.commit()
            finally:
                committed.extend(writer.take_committed())

    for _ in range(20):
        try:
            write()
            break
        except StoreError as error:
            # Every try of one request was lost: the user is told to run again.
            unreported += "failed 6 times" in str(error)
    assert s3_faults.lost > 0
    s3_faults.stop()
    expect_exactly(url, 12)
    assert len(committed) == len(set(committed))
    if not unreported:
        assert len(committed) == 12


def test_lost_reads_are_read_again(s3: str, s3_faults: Any, fill: Fill, sequence: Sequence) -> None:
    fill(f"{s3}/store", 4, tokens_per_part=100)
    s3_faults.lose(0.2, seed=0, methods=("GET",))
    reader = FeatureReader(FeatureStore.open(place(f"{s3}/store", retry=Retry(tries=20, pause_s=0.001))))
    for i in range(4):
        assert np.array_equal(reader.features(i).aux_hidden, sequence(i).aux_hidden)
    assert s3_faults.lost > 0


def test_a_lost_answer_to_the_publishing_request_is_taken_as_won(
    s3: str, s3_faults: Any, info: DatasetInfo, sequence: Sequence, origin: OriginOf, expect_exactly: ExpectExactly
) -> None:
    store = FeatureStore.create(place(f"{s3}/store"), info)
    s3_faults.lose_answer("commits/u000000.json")
    with FeatureWriter(store, tokens_per_part=10_000) as writer:
        for i in range(3):
            writer.add(sequence(i), origin(i))
    assert s3_faults.lost == 1
    assert writer.committed_sequences == len(writer.take_committed()) == 3
    assert store.place.names("commits") == ["u000000.json"]
    assert verify(store).unreferenced == []
    expect_exactly(f"{s3}/store", 3)


def test_a_name_is_given_once_whatever_is_lost(s3: str, s3_faults: Any) -> None:
    files = place(s3)
    s3_faults.lose_answer("first")
    assert files.publish("folder/first", b"mine")
    assert files.publish("folder/first", b"mine")
    assert not files.publish("folder/first", b"another's")
    assert files.read("folder/first") == b"mine"
    outcomes: list[bool] = []
    patient = place(s3, retry=Retry(tries=30, pause_s=0.001))
    threads = [
        threading.Thread(target=lambda i=i: outcomes.append(patient.publish("folder/raced", b"%d" % i)))
        for i in range(8)
    ]
    s3_faults.lose(0.3, seed=0)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]


@pytest.mark.parametrize("status", ["409 Conflict", "503 Slow Down"])
def test_a_server_that_puts_off_its_answer_is_asked_again(s3: str, s3_faults: Any, status: str) -> None:
    s3_faults.answer("folder/name", status)
    assert place(s3).publish("folder/name", b"content")
    assert s3_faults.lost == 1


def test_the_target_is_whole_once_it_is_there(s3: str, info: DatasetInfo) -> None:
    store = FeatureStore.create(f"{s3}/store", info)

    def write(content: bytes, is_killed: bool) -> None:
        with store.new_target() as directory:
            (directory / "config.json").write_bytes(content)
            (directory / "head.safetensors").write_bytes(content * 100)
            if is_killed:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(b"{}", is_killed=True)
    assert not store.has_target
    with pytest.raises(StoreError, match=rf"^{s3}/store/target: missing. Rerun `specx extract`"):
        _ = store.target_directory
    # As if killed while it was sent: the config is the last to come.
    obstore.put(bucket(s3), "store/target/head.safetensors", b"half")
    assert not store.has_target
    write(b"{ }", is_killed=False)
    assert store.has_target
    assert (store.target_directory / "head.safetensors").read_bytes() == b"{ }" * 100
    assert store.target_directory == store.target_directory


def test_rejects_and_summary_are_those_of_a_local_store(s3: str, tmp_path: Path, fill: Fill) -> None:
    summaries = []
    for path in (tmp_path / "store", f"{s3}/store"):
        store = fill(path, 5, tokens_per_part=200)
        with RejectLog(store.place, rows_per_file=3) as log:
            for row in range(7):
                log.add(Reject(source="first.jsonl", row=row, reason="too_long", detail=""))
        assert sorted(reject.row for reject in read_rejects(store.place)) == list(range(7))
        summaries.append(summary(FeatureStore.open(path)))
    assert summaries[0].pop("store") == str(tmp_path / "store")
    assert summaries[1].pop("store") == f"{s3}/store"
    assert summaries[0] == summaries[1]
    assert summaries[0]["rejected"] == 7


def test_a_writer_works_in_a_thread_that_did_not_make_it(
    s3: str, info: DatasetInfo, sequence: Sequence, origin: OriginOf, expect_exactly: ExpectExactly
) -> None:
    writer = FeatureWriter(FeatureStore.create(f"{s3}/store", info), tokens_per_part=100)

    def write() -> None:
        for i in range(5):
            writer.add(sequence(i), origin(i))

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    writer.commit()
    expect_exactly(f"{s3}/store", 5)
