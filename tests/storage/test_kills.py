"""Two writers at once on one store, killed again and again: nothing is lost, nothing is there twice, no bit differs.

20 kills on a disk and 5 on S3, or as many as SPECX_KILLS and SPECX_S3_KILLS say: `make torture` has 200 and 50.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specx.storage.catalog.sequence_id import sequence_id
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.schema import DatasetInfo, SequenceFeatures
from specx.storage.store import FeatureStore

Start = Callable[..., subprocess.Popen[str]]

SEQUENCES = 40

POINTS = (
    "part begun",
    "part closed",
    "part put",
    "record about to be published",
    "record written and not linked",
    "record linked",
    "record published",
)

WRITER = """
import os, random, signal
from specx.storage import writer
from specx.storage.parts import part_writer as part
path, seed, point, occurrence = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
left = occurrence

def crash():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def crashing(holder, name, *, before):
    call = getattr(holder, name)
    def wrapped(*arguments, **options):
        if before:
            crash()
        result = call(*arguments, **options)
        if not before:
            crash()
        return result
    setattr(holder, name, wrapped)

store = made["FeatureStore"].open(path)
place = type(store.place)
crashing_at = {
    "part begun": (place, "begin_tree", False),
    "part closed": (part.PartWriter, "close", False),
    "part put": (place, "put_tree", False),
    "record about to be published": (place, "publish", True),
    "record written and not linked": (os, "link", True),
    "record linked": (os, "link", False),
    "record published": (place, "publish", False),
}
if point:
    holder, name, before = crashing_at[point]
    crashing(holder, name, before=before)
order = list(range(int(sys.argv[5])))
random.Random(seed).shuffle(order)
print("ready", flush=True)
with made["FeatureWriter"](store, tokens_per_part=200) as opened:
    for i in order:
        opened.add(made["sequence"](i), made["origin"](i))
"""


def kill_writers(path: str, start: Start, kills: int, generator: random.Random, points: tuple[str, ...]) -> int:
    """Let two writers work, kill both at a point of the code or at any moment, and again; return how many were killed.

    Ends early once the store is full, so that nobody is left to be killed.
    """
    killed = 0
    for turn in range(2 * kills):
        if killed >= kills or len(FeatureStore.open(path).catalogue()) == SEQUENCES:
            break
        writers = []
        for number in range(2):
            point = generator.choice(points) if generator.random() < 0.6 else ""
            arguments = (path, 2 * turn + number, point, generator.randint(1, 2), SEQUENCES)
            writers.append((start(WRITER, *arguments), point))
        for process, _ in writers:
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(generator.uniform(0, 0.25))
        for process, point in writers:
            if not point:
                process.kill()
            _, errors = process.communicate(timeout=120)
            # One that was to be killed at a point may have found nothing left to do.
            assert process.returncode in (0, -signal.SIGKILL), errors
            killed += process.returncode != 0
    return killed


def assert_whole(
    path: str,
    start: Start,
    sequence: Callable[[int], SequenceFeatures],
    assert_same: Callable[[SequenceFeatures, SequenceFeatures], None],
) -> None:
    """A last writer completes the store, and it is as if nobody had been killed."""
    last = start(WRITER, path, 0, "", 0, SEQUENCES)
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    store = FeatureStore.open(path)
    reader = FeatureReader(store)
    expected = {sequence_id(sequence(i).input_ids): i for i in range(SEQUENCES)}
    found = [bytes(each) for each in reader.catalogue.ids]
    assert len(found) == len(set(found)), "a sequence is there twice"
    assert set(found) == set(expected), "a sequence was lost"
    for number, identifier in enumerate(found):
        assert_same(reader.features(number), sequence(expected[identifier]))
    assert verify(store).problems == []


def test_writers_killed_on_a_disk(
    tmp_path: Path,
    start: Start,
    info: DatasetInfo,
    sequence: Callable[[int], SequenceFeatures],
    assert_same: Callable[[SequenceFeatures, SequenceFeatures], None],
) -> None:
    wanted, killed = int(os.environ.get("SPECX_KILLS", "20")), 0
    generator = random.Random(0)
    for number in range(wanted):
        if killed >= wanted:
            break
        path = str(tmp_path / str(number))
        FeatureStore.create(path, info)
        killed += kill_writers(path, start, wanted - killed, generator, POINTS)
        assert_whole(path, start, sequence, assert_same)
    print(f"{killed} writers killed on a disk")
    assert killed >= wanted


def test_writers_killed_on_s3(
    s3: str,
    start: Start,
    info: DatasetInfo,
    sequence: Callable[[int], SequenceFeatures],
    assert_same: Callable[[SequenceFeatures, SequenceFeatures], None],
) -> None:
    wanted, killed = int(os.environ.get("SPECX_S3_KILLS", "5")), 0
    generator = random.Random(1)
    points = tuple(point for point in POINTS if "linked" not in point)
    for number in range(wanted):
        if killed >= wanted:
            break
        path = f"{s3}/{number}"
        FeatureStore.create(path, info)
        killed += kill_writers(path, start, wanted - killed, generator, points)
        assert_whole(path, start, sequence, assert_same)
    print(f"{killed} writers killed on S3")
    assert killed >= wanted


@pytest.mark.parametrize("point", POINTS)
def test_every_crash_point_is_met(
    tmp_path: Path,
    start: Start,
    info: DatasetInfo,
    sequence: Callable[[int], SequenceFeatures],
    assert_same: Callable[[SequenceFeatures, SequenceFeatures], None],
    point: str,
) -> None:
    path = str(tmp_path / "store")
    FeatureStore.create(path, info)
    process = start(WRITER, path, 0, point, 2, SEQUENCES)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert_whole(path, start, sequence, assert_same)
