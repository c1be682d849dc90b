"""What of a store on S3 lies on the local disk, and for how long."""

import gc
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.schema import DatasetInfo, Origin, SequenceFeatures
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter

from ..objects import place

Fill = Callable[..., FeatureStore]
Sequence = Callable[[int], SequenceFeatures]
OriginOf = Callable[[int], Origin]
ExpectExactly = Callable[[str, int], None]
Start = Callable[..., subprocess.Popen[str]]


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
