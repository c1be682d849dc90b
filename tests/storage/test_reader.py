"""What is written is what is read, bit for bit, or the read is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specx.storage.errors import StoreCorruptError, StoreError
from specx.storage.reader import FeatureReader, check_metadata, check_sizes
from specx.storage.schema import DatasetInfo, Origin, SequenceFeatures, array_specs
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter

Fill = Callable[..., FeatureStore]
AssertSame = Callable[[SequenceFeatures, SequenceFeatures], None]

# Ends: 200, then inside the next chunk of 256, on a chunk, just short of the shard of 4096, across it, and on.
LENGTHS = (200, 100, 212, 3580, 30, 700, 1)
CODECS = ["lossless", "zstd", "none"]
READ_ARRAYS = list(SequenceFeatures.__slots__)


@pytest.fixture(scope="module")
def written(make_features: Callable[[int, int], SequenceFeatures]) -> list[SequenceFeatures]:
    return [make_features(length, i) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=CODECS)
def store(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    info: DatasetInfo,
    written: list[SequenceFeatures],
) -> FeatureStore:
    """One part that crosses every kind of edge, and a small second one."""
    path = tmp_path_factory.mktemp("read") / "store"
    store = FeatureStore.create(path, info.model_copy(update={"codec": request.param}))
    with FeatureWriter(store, tokens_per_part=4500) as writer:
        for i, features in enumerate(written):
            writer.add(features, Origin(source="made-up", row=i))
    assert len(store.records) == 2
    return FeatureStore.open(path)


@pytest.fixture(scope="module", params=CODECS)
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, fill: Fill) -> FeatureStore:
    """A store of 6 sequences in one part; each test puts back what it changed."""
    return fill(tmp_path_factory.mktemp("damage") / "store", 6, 10_000, codec=request.param)


def array_file(store: FeatureStore, name: str, kind: str) -> Path:
    """The metadata or the only shard of one array of the first part."""
    array = Path(store.part_path(store.records[0])) / name
    if kind == "zarr.json":
        return array / kind
    return next(path for path in (array / "c").rglob("0") if path.is_file())


def test_every_sequence_is_read_as_it_was_written(
    store: FeatureStore, written: list[SequenceFeatures], assert_same: AssertSame
) -> None:
    reader = FeatureReader(store)
    for i in np.random.default_rng(0).permutation(len(written)).tolist():
        assert_same(reader.features(i), written[i])


@pytest.mark.parametrize("name", [name for name in READ_ARRAYS if name != "aux_hidden"])
def test_a_prefix_of_a_sequence_is_a_prefix_of_its_features(
    store: FeatureStore, written: list[SequenceFeatures], name: str
) -> None:
    reader = FeatureReader(store)
    for i, features in enumerate(written):
        rows = features.arrays()[name]
        for length in {1, len(rows) // 2, len(rows) - 1, len(rows)}:
            out = np.empty_like(rows[:length])
            reader.read(i, name, out)
            assert out.tobytes() == rows[:length].tobytes(), (i, length)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_one_boundary_is_read_alone(store: FeatureStore, written: list[SequenceFeatures], column: int) -> None:
    reader = FeatureReader(store)
    for i, features in enumerate(written):
        rows = features.aux_hidden[:, column]
        for length in {1, len(rows) // 2, len(rows)}:
            out = np.empty((length, rows.shape[1]), np.uint16)
            reader.read(i, "aux_hidden", out, column)
            assert np.array_equal(out, rows[:length]), (i, length)


def test_a_reader_of_some_units_sees_no_others(
    store: FeatureStore, written: list[SequenceFeatures], assert_same: AssertSame
) -> None:
    reader = FeatureReader(store, units=[1])
    assert len(reader.catalogue) == 1
    assert_same(reader.features(0), written[-1])


def test_a_unit_that_is_not_committed_is_refused(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match=r"u000007\.json: missing"):
        FeatureReader(store, units=[0, 7])


def test_reading_one_boundary_needs_no_other(
    damaged: FeatureStore, sequence: Callable[[int], SequenceFeatures]
) -> None:
    shard = array_file(damaged, "aux_hidden", "shard")
    content = shard.read_bytes()
    try:
        # The chunks of boundary 0 come first in the shard.
        shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        reader = FeatureReader(damaged)
        out = np.empty_like(sequence(0).aux_hidden[:, 1])
        reader.read(0, "aux_hidden", out, 1)
        assert np.array_equal(out, sequence(0).aux_hidden[:, 1])
        with pytest.raises(StoreCorruptError, match="checksum of chunk"):
            reader.read(0, "aux_hidden", out, 0)
    finally:
        shard.write_bytes(content)


def refused_reads(reader: FeatureReader, name: str, sequence: Callable[[int], SequenceFeatures]) -> list[str]:
    """Read one array of 6 sequences; what is not refused must be right. Return the refusals."""
    refusals = []
    for i in range(6):
        expected = sequence(i).arrays()[name]
        out = np.empty_like(expected)
        try:
            if name == "aux_hidden":
                for column in range(out.shape[1]):
                    reader.read(i, name, out[:, column], column)
            else:
                reader.read(i, name, out)
        except StoreCorruptError as error:
            refusals.append(str(error))
        else:
            assert out.tobytes() == expected.tobytes()
    return refusals


@pytest.mark.parametrize("kind", ["shard", "zarr.json"])
@pytest.mark.parametrize("name", READ_ARRAYS)
def test_a_flipped_byte_is_never_read_as_a_value(
    damaged: FeatureStore, sequence: Callable[[int], SequenceFeatures], name: str, kind: str
) -> None:
    path = array_file(damaged, name, kind)
    content = path.read_bytes()
    rng = np.random.default_rng([READ_ARRAYS.index(name), kind == "shard"])
    try:
        for position in [*rng.integers(0, len(content), 2).tolist(), len(content) - 1]:
            flipped = bytearray(content)
            flipped[position] ^= int(rng.integers(1, 256))
            path.write_bytes(flipped)
            refusals = refused_reads(FeatureReader(FeatureStore.open(damaged.root)), name, sequence)
            assert refusals, position
            assert all(str(path) in refusal for refusal in refusals)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["aux_hidden", "lse", "seq_ids"])
@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_truncated_file_is_refused_before_anything_is_read(damaged: FeatureStore, name: str, kept: int) -> None:
    path = array_file(damaged, name, "shard")
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    try:
        with pytest.raises(StoreCorruptError, match=rf"{path}: \d+ bytes, the commit record says {len(content)} bytes"):
            FeatureReader(FeatureStore.open(damaged.root)).features(0)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["shard", "zarr.json"])
@pytest.mark.parametrize("name", ["last_hidden", "input_ids", "seq_offsets"])
def test_a_missing_file_is_refused_before_anything_is_read(damaged: FeatureStore, name: str, kind: str) -> None:
    path = array_file(damaged, name, kind)
    content = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(StoreCorruptError, match=rf"{path}: missing.*Delete .*u000000\.json and rerun"):
            FeatureReader(FeatureStore.open(damaged.root)).features(0)
    finally:
        path.write_bytes(content)


def test_a_missing_part_stops_only_its_own_sequences(
    tmp_path: Path, fill: Fill, sequence: Callable[[int], SequenceFeatures], assert_same: AssertSame
) -> None:
    store = fill(tmp_path / "store", 4, tokens_per_part=50)
    shutil.rmtree(store.part_path(store.records[0]))
    reader = FeatureReader(FeatureStore.open(store.root))
    lost = int((reader.catalogue.unit == 0).sum())
    with pytest.raises(StoreCorruptError, match="missing"):
        reader.features(0)
    assert_same(reader.features(lost), sequence(lost))


@pytest.mark.parametrize("key", ["../../dataset.json", "/etc/hostname", "lse/../../x"])
def test_an_object_outside_its_part_is_refused(tmp_path: Path, fill: Fill, key: str) -> None:
    store = fill(tmp_path / "store", 1, tokens_per_part=50)
    record = store.records[0]
    objects = (record.objects[0].model_copy(update={"key": key}), *record.objects[1:])
    forged = record.model_copy(update={"objects": objects}).sealed()
    Path(store.commit_path(0)).write_bytes(forged.to_bytes())
    with pytest.raises(StoreCorruptError, match="expected one inside the store"):
        FeatureReader(FeatureStore.open(store.root)).features(0)


def test_a_sound_part_passes_the_opening_checks(store: FeatureStore) -> None:
    for record in store.records.values():
        check_sizes(store, record)
        check_metadata(store, record, Path(store.part_path(record)))
    assert {stored.key.partition("/")[0] for stored in store.records[0].objects} >= set(array_specs(store.info))
