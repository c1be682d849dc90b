"""A store on S3, over a network that loses requests and answers: nothing lost, nothing twice, no wrong byte."""

import gc
import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from obstore.store import S3Store

from specx.storage.errors import StoreCorruptError, StoreError
from specx.storage.hashing import sequence_id
from specx.storage.reader import FeatureReader
from specx.storage.rejects import RejectLog, read_rejects
from specx.storage.retry import Retry
from specx.storage.s3 import S3Place
from specx.storage.schema import DatasetInfo, Origin, Reject, SequenceFeatures
from specx.storage.store import FeatureStore
from specx.storage.summary import summary
from specx.storage.verify import verify
from specx.storage.writer import FeatureWriter

Fill = Callable[..., FeatureStore]
Sequence = Callable[[int], SequenceFeatures]
OriginOf = Callable[[int], Origin]
ExpectExactly = Callable[[str, int], None]
Start = Callable[..., subprocess.Popen[str]]

QUICK = Retry(pause_s=0.001)


def place(url: str, **settings: Any) -> S3Place:
    return S3Place(url, **({"retry": QUICK} | settings))


def bucket(s3: str) -> S3Store:
    """The whole bucket, past our own code."""
    return S3Store(s3.removeprefix("s3://"), client_options={"allow_http": True})


def keys(s3: str) -> list[str]:
    return sorted(each["path"] for each in obstore.list(bucket(s3)).collect())


@pytest.fixture
def expect_exactly(sequence: Sequence, assert_same: Callable[..., None]) -> ExpectExactly:
    """Check that a store is sound and holds sequences 0 to ``n - 1``, each once, bit for bit."""

    def check(url: str, n: int) -> None:
        store = FeatureStore.open(url)
        assert verify(store).problems == []
        names = [bytes(row) for row in store.catalogue().ids]
        expected = [sequence(i) for i in range(n)]
        assert sorted(names) == sorted(sequence_id(features.input_ids) for features in expected)
        reader = FeatureReader(store)
        for features in expected:
            assert_same(reader.features(names.index(sequence_id(features.input_ids))), features)

    return check


@pytest.fixture
def local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


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


def a_key(store: FeatureStore, name: str) -> str:
    """The whole key of an object of the first part."""
    prefix = store.root.split("/", 3)[3]
    return f"{prefix}/{store.part_key(store.records[0])}/{name}"


@pytest.mark.parametrize("kept", [None, 0, -1], ids=["deleted", "emptied", "cut"])
@pytest.mark.parametrize("name", ["aux_hidden/c/0/0/0", "lse/zarr.json"])
def test_a_missing_or_truncated_object_is_refused_on_read_and_found_by_verify(
    s3: str, fill: Fill, name: str, kept: int | None
) -> None:
    store = fill(f"{s3}/store", 4, tokens_per_part=100)
    key = a_key(store, name)
    content = bytes(obstore.get(bucket(s3), key).bytes())
    if kept is None:
        obstore.delete(bucket(s3), key)
    else:
        obstore.put(bucket(s3), key, content[:kept])
    found = "missing" if kept is None else f"{len(content[:kept])} bytes"
    message = (
        f"{s3}/{key}: {found}, the commit record says {len(content)} bytes. Delete {s3}/store/commits/u000000.json"
    )
    reader = FeatureReader(FeatureStore.open(f"{s3}/store"))
    with pytest.raises(StoreCorruptError) as caught:
        reader.features(0)
    assert str(caught.value).startswith(message)
    (problem,) = verify(FeatureStore.open(f"{s3}/store")).problems
    assert problem.startswith(message)


@pytest.mark.parametrize("name", ["aux_hidden/c/0/0/0", "lse/zarr.json"])
def test_a_changed_byte_is_never_read_as_a_value_and_is_told_by_its_url(s3: str, fill: Fill, name: str) -> None:
    store = fill(f"{s3}/store", 2, tokens_per_part=10_000)
    key = a_key(store, name)
    content = bytearray(obstore.get(bucket(s3), key).bytes())
    content[10] ^= 1
    obstore.put(bucket(s3), key, bytes(content))
    with pytest.raises(StoreCorruptError, match=f"^{s3}/{key}: "):
        FeatureReader(FeatureStore.open(f"{s3}/store")).features(0)
    (problem,) = verify(FeatureStore.open(f"{s3}/store")).problems
    assert problem.startswith(f"{s3}/{key}: ")


def test_an_object_that_vanishes_while_it_is_fetched_is_one_line(s3: str, fill: Fill) -> None:
    store = fill(f"{s3}/store", 1, tokens_per_part=50)
    sizes = store.place.sizes(store.part_key(store.records[0])) | {"lse/c/9": 100}
    tree = store.part_key(store.records[0])
    with pytest.raises(StoreCorruptError, match=r"lse/c/9: missing"), store.place.local_tree(tree, sizes):
        pass


@pytest.mark.parametrize("part", ["../outside.zarr", "/outside.zarr"])
def test_a_part_outside_the_store_is_refused(s3: str, fill: Fill, part: str) -> None:
    store = fill(f"{s3}/store", 1, tokens_per_part=50)
    forged = store.records[0].model_copy(update={"part": part}).sealed()
    obstore.put(bucket(s3), "store/commits/u000000.json", forged.to_bytes())
    with pytest.raises(StoreCorruptError, match="expected one inside the store"):
        FeatureReader(FeatureStore.open(f"{s3}/store")).features(0)


def test_parts_give_way_on_the_local_disk_and_come_back(
    s3: str, local_directory: Path, fill: Fill, sequence: Sequence, assert_same: Callable[..., None]
) -> None:
    store = fill(f"{s3}/store", 8, tokens_per_part=100)
    largest = max(sum(one.size for one in record.objects) for record in store.records.values())
    del store
    gc.collect()
    reader = FeatureReader(FeatureStore.open(place(f"{s3}/store", cache_bytes=2 * largest)))
    for i in np.random.default_rng(0).integers(0, 8, 40).tolist():
        assert_same(reader.features(i), sequence(i))
        held = sum(path.stat().st_size for path in local_directory.rglob("*") if path.is_file())
        assert held <= 2 * largest


def test_nothing_stays_on_the_local_disk(
    s3: str, local_directory: Path, info: DatasetInfo, fill: Fill, sequence: Sequence, origin: OriginOf
) -> None:
    def files() -> list[Path]:
        return [path for path in local_directory.rglob("*") if path.is_file()]

    store = fill(f"{s3}/store", 4, tokens_per_part=100)
    assert files() == []
    assert verify(store).problems == []
    assert files() == []
    FeatureReader(store).features(0)
    assert files() != []
    with FeatureWriter(store, tokens_per_part=10_000) as writer:
        writer.add(sequence(9), origin(9))
        assert [path for path in files() if "written" in path.parts]
        writer.discard()
    assert not [path for path in files() if "written" in path.parts]
    del store, writer
    gc.collect()
    assert list(local_directory.iterdir()) == []


def test_a_process_that_ends_leaves_no_temporary_directory(s3: str, tmp_path: Path, start: Start, fill: Fill) -> None:
    fill(f"{s3}/store", 2, tokens_per_part=100)
    program = """
import tempfile
tempfile.tempdir = sys.argv[2]
from specx.storage.reader import FeatureReader
reader = FeatureReader(made["FeatureStore"].open(sys.argv[1]))
print(len(reader.features(0).lse), len(list(made["Path"](sys.argv[2]).iterdir())))
"""
    out, errors = start(program, f"{s3}/store", tmp_path).communicate(timeout=300)
    assert out.split()[1:] == ["1"], errors
    assert list(tmp_path.iterdir()) == []


def test_a_full_local_disk_is_one_clear_line(s3: str, start: Start, expect_exactly: ExpectExactly) -> None:
    program = """
import json, resource
from specx.storage.errors import StoreFullError
store = made["FeatureStore"].create(sys.argv[1], made["INFO"])
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    with made["FeatureWriter"](store, tokens_per_part=50) as writer:
        writer.add(made["sequence"](0), made["origin"](0))
        writer.commit()
        writer.add(made["make_features"](2000, 2), made["origin"](2))
except StoreFullError as error:
    print(json.dumps(str(error)))
"""
    out, errors = start(program, f"{s3}/store").communicate(timeout=300)
    assert out, errors
    assert "What was finished before is kept: free some space there, or set TMPDIR" in json.loads(out)
    expect_exactly(f"{s3}/store", 1)
    assert verify(FeatureStore.open(f"{s3}/store")).unreferenced == []


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
        with RejectLog(store, rows_per_file=3) as log:
            for row in range(7):
                log.add(Reject(source="first.jsonl", row=row, reason="too_long", detail=""))
        assert sorted(reject.row for reject in read_rejects(store)) == list(range(7))
        summaries.append(summary(FeatureStore.open(path)))
    assert summaries[0].pop("store") == str(tmp_path / "store")
    assert summaries[1].pop("store") == f"{s3}/store"
    assert summaries[0] == summaries[1]
    assert summaries[0]["rejected"] == 7


def test_the_command_line_shows_and_verifies_it(
    s3: str, fill: Fill, specx: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    store = fill(f"{s3}/store", 3, tokens_per_part=100)
    shown = specx("store", "info", f"{s3}/store", "--json")
    assert json.loads(shown.stdout.splitlines()[-1])["sequences"] == 3, shown.stderr
    assert specx("store", "verify", f"{s3}/store").returncode == 0
    obstore.delete(bucket(s3), a_key(store, "lse/c/0"))
    damaged = specx("store", "verify", f"{s3}/store")
    assert damaged.returncode == 1
    assert f"specx: {s3}/store: 1 damaged: {s3}/{a_key(store, 'lse/c/0')}: missing" in damaged.stderr


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
