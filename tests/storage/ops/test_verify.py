"""Whatever differs from what was committed is found and named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specx.storage.catalog.sequence_id import sequence_id
from specx.storage.errors import StoreError
from specx.storage.ops.verify import drop_damaged, require_sound, verify
from specx.storage.parts.part_writer import SEQUENCE_TABLE, PartWriter
from specx.storage.schema import CommitRecord, DatasetInfo, Origin, SequenceFeatures
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter

Fill = Callable[..., FeatureStore]

ARRAYS = [*SequenceFeatures.__slots__, *SEQUENCE_TABLE]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, fill: Fill) -> FeatureStore:
    """A store of 5 sequences in one part; each test puts back what it changed."""
    return fill(tmp_path_factory.mktemp("verify") / "store", 5, 10_000)


@pytest.fixture(scope="module")
def raw(
    tmp_path_factory: pytest.TempPathFactory, info: DatasetInfo, make_features: Callable[[int, int], SequenceFeatures]
) -> Path:
    """Two parts of equal size, of two shards each, without compression: files that fit in each other's place."""
    path = tmp_path_factory.mktemp("raw") / "store"
    store = FeatureStore.create(path, info.model_copy(update={"codec": "none"}))
    with FeatureWriter(store, tokens_per_part=8192) as writer:
        for i in range(2):
            writer.add(make_features(8192, i), Origin(source="made-up", row=i))
    return path


@pytest.fixture
def raw_store(tmp_path: Path, raw: Path) -> FeatureStore:
    """A copy of ``raw``, to be damaged."""
    return FeatureStore.open(shutil.copytree(raw, tmp_path / "store"))


def problems(path: Path) -> list[str]:
    return verify(FeatureStore.open(path)).problems


def file_of(store: FeatureStore, key: str) -> Path:
    """A file of the first part: its ``zarr.json``, an array's, or an array's only shard."""
    part = Path(store.part_path(store.records[0]))
    if key.endswith("zarr.json"):
        return part / key
    return next(path for path in (part / key / "c").rglob("0") if path.is_file())


def commit(store: FeatureStore, record: CommitRecord) -> None:
    Path(store.commit_path(record.unit)).write_bytes(record.sealed().to_bytes())


def test_a_sound_store_has_no_problems_and_its_numbers_add_up(store: FeatureStore) -> None:
    result = verify(FeatureStore.open(store.root))
    catalogue = store.catalogue()
    assert result.problems == []
    assert result.unreferenced == []
    assert (result.sequences, result.tokens) == (5, int(catalogue.length.sum()))
    assert result.bytes == sum(path.stat().st_size for path in Path(store.root, "parts").rglob("*") if path.is_file())
    require_sound(store.root, result)


@pytest.mark.parametrize("key", ["zarr.json", *(f"{name}/zarr.json" for name in ARRAYS), *ARRAYS])
def test_a_flipped_byte_of_any_file_is_found(store: FeatureStore, key: str) -> None:
    path = file_of(store, key)
    content = path.read_bytes()
    rng = np.random.default_rng(len(key) + sum(key.encode()))
    try:
        for position in [*rng.integers(0, len(content), 2).tolist(), len(content) - 1]:
            flipped = bytearray(content)
            flipped[position] ^= int(rng.integers(1, 256))
            path.write_bytes(flipped)
            (problem,) = problems(store.root)
            assert problem.startswith(f"{path}: ")
            assert "its hash is" in problem or "the metadata was changed" in problem
            assert str(store.commit_path(0)) in problem
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("kept", [None, 0, 7, -1], ids=["deleted", "emptied", "cut", "one_byte_short"])
@pytest.mark.parametrize("key", ["zarr.json", "argmax/zarr.json", "topk_ids", "seq_offsets"])
def test_a_deleted_or_truncated_file_is_found(store: FeatureStore, key: str, kept: int | None) -> None:
    path = file_of(store, key)
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[:kept])
    try:
        (problem,) = problems(store.root)
        found = "missing" if kept is None else f"{len(content[:kept])} bytes"
        assert problem.startswith(f"{path}: {found}, the commit record says {len(content)} bytes")
    finally:
        path.write_bytes(content)


def test_a_file_with_bytes_added_is_found(store: FeatureStore) -> None:
    path = file_of(store, "lse")
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    try:
        assert len(problems(store.root)) == 1
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0/last_hidden/c/0/0", "0/last_hidden/c/1/0"),
        ("0/aux_hidden/c/0/0/0", "0/aux_hidden/c/1/0/0"),
        ("0/aux_hidden/c/1/0/0", "1/aux_hidden/c/1/0/0"),
        ("0/loss_mask/c/0", "1/loss_mask/c/0"),
        ("0/topk_logprob/c/0/0", "1/topk_logprob/c/0/0"),
        ("0/argmax/c/0", "0/input_ids/c/0"),
        ("0/seq_ids/c/0/0", "1/seq_ids/c/0/0"),
    ],
)
def test_two_files_that_changed_places_are_found(raw_store: FeatureStore, first: str, second: str) -> None:
    paths = []
    for key in (first, second):
        unit, _, name = key.partition("/")
        paths.append(Path(raw_store.part_path(raw_store.records[int(unit)])) / name)
    contents = [path.read_bytes() for path in paths]
    assert len(contents[0]) == len(contents[1])
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    found = problems(raw_store.root)
    assert len(found) == len({path.relative_to(raw_store.root).parts[1] for path in paths})


def test_two_parts_that_changed_places_are_found(raw_store: FeatureStore) -> None:
    first, second = (Path(raw_store.part_path(record)) for record in raw_store.records.values())
    first.rename(first.with_name("aside"))
    second.rename(first)
    first.with_name("aside").rename(second)
    assert len(problems(raw_store.root)) == 2


def test_every_damaged_part_is_named_and_the_sound_ones_are_counted(tmp_path: Path, fill: Fill) -> None:
    store = fill(tmp_path / "store", 6, tokens_per_part=50)
    assert len(store.records) > 3
    shutil.rmtree(store.part_path(store.records[0]))
    (Path(store.part_path(store.records[2])) / "lse" / "zarr.json").unlink()
    result = verify(FeatureStore.open(store.root))
    assert len(result.problems) == 2
    assert result.sequences == sum(
        len(store.records[unit].sequences.ids) for unit in store.records if unit not in (0, 2)
    )
    with pytest.raises(StoreError, match=r"2 damaged: .*missing.* \(and 1 more\)$"):
        require_sound(store.root, result)


def test_a_store_without_its_parts_directory_is_a_problem_and_no_crash(tmp_path: Path, fill: Fill) -> None:
    store = fill(tmp_path / "store", 1, tokens_per_part=50)
    shutil.rmtree(Path(store.root) / "parts")
    assert len(problems(store.root)) == 1


def test_a_sequence_committed_twice_is_found(tmp_path: Path, fill: Fill) -> None:
    store = fill(tmp_path / "store", 2, tokens_per_part=10_000)
    commit(store, store.records[0].model_copy(update={"unit": 1}))
    (problem,) = problems(store.root)
    assert "is committed twice, first in unit 0" in problem


def test_a_record_with_other_sequences_than_its_part_is_found(tmp_path: Path, fill: Fill) -> None:
    store = fill(tmp_path / "store", 2, tokens_per_part=10_000)
    record = store.records[0]
    columns = record.sequences.model_copy(update={"ids": record.sequences.ids[::-1]})
    commit(store, record.model_copy(update={"sequences": columns}))
    (problem,) = problems(store.root)
    assert "its sequence table is not the commit record's" in problem


def test_tokens_that_are_not_the_named_sequence_are_found(
    tmp_path: Path, info: DatasetInfo, fill: Fill, sequence: Callable[[int], SequenceFeatures]
) -> None:
    store = fill(tmp_path / "store", 1, tokens_per_part=50)
    part = PartWriter(Path(store.root) / "parts" / "wrong.zarr", info)
    part.append(sequence(1))
    name = sequence_id(sequence(2).input_ids)
    objects = part.close([name])
    columns = store.records[0].sequences.model_copy(update={"ids": (name.hex(),), "lengths": (part.tokens,)})
    commit(
        store,
        store.records[0].model_copy(
            update={"unit": 1, "part": part.path.name, "objects": objects, "sequences": columns}
        ),
    )
    (problem,) = problems(store.root)
    assert f"tokens 0:{part.tokens} are not sequence {name.hex()}" in problem


@pytest.mark.parametrize("part", ["../outside.zarr", "/outside.zarr"])
def test_a_part_outside_the_store_is_a_problem(tmp_path: Path, fill: Fill, part: str) -> None:
    store = fill(tmp_path / "store", 1, tokens_per_part=50)
    commit(store, store.records[0].model_copy(update={"part": part}))
    (problem,) = problems(store.root)
    assert "expected one inside the store" in problem


def test_leftovers_of_killed_runs_are_listed_and_harmless(tmp_path: Path, fill: Fill) -> None:
    store = fill(tmp_path / "store", 2, tokens_per_part=50)
    (Path(store.root) / "parts" / "u000009-0.zarr").mkdir()
    (Path(store.root) / "commits" / ".tmp-0-u000009.json").write_text("{")
    result = verify(FeatureStore.open(store.root))
    assert result.problems == []
    assert result.unreferenced == ["parts/u000009-0.zarr", "commits/.tmp-0-u000009.json"]


def test_what_is_damaged_is_dropped_and_filled_again_and_nothing_else(tmp_path: Path, fill: Fill) -> None:
    store = fill(tmp_path / "store", 12, tokens_per_part=200)
    assert len(store.records) >= 4
    shutil.rmtree(store.part_path(store.records[0]))
    record = Path(store.commit_path(2))
    record.write_bytes(record.read_bytes()[:-20])
    with pytest.raises(StoreError):
        FeatureStore.open(store.root)
    damaged = FeatureStore.open(store.root, tolerant=True)
    result = verify(damaged)
    assert sorted(result.damaged_units) == [0, 2]
    drop_damaged(damaged, result)
    assert result.problems == []
    lost = sum(len(store.records[unit].sequences.ids) for unit in (0, 2))
    assert len(FeatureStore.open(store.root).catalogue()) == 12 - lost
    refilled = fill(tmp_path / "store", 12, tokens_per_part=200)
    assert len(refilled.catalogue()) == 12
    kept = set(store.records) - {0, 2}
    assert all(refilled.records[unit] == store.records[unit] for unit in kept)
    assert verify(FeatureStore.open(store.root)).problems == []


def test_a_newer_commit_is_no_damage_and_is_not_dropped(tmp_path: Path, fill: Fill) -> None:
    store = fill(tmp_path / "store", 2, tokens_per_part=10_000)
    commit(store, store.records[0].model_copy(update={"format": 99}))
    with pytest.raises(StoreError, match="Upgrade specx"):
        FeatureStore.open(store.root, tolerant=True)


@pytest.mark.parametrize("name", ["config.json", "head.safetensors", "hashes.json"])
@pytest.mark.parametrize("is_deleted", [False, True])
def test_damage_to_the_target_s_files_is_found_and_never_used(
    tmp_path: Path, fill: Fill, name: str, is_deleted: bool
) -> None:
    store = fill(tmp_path / "store", 2, tokens_per_part=10_000)
    with store.new_target() as directory:
        (directory / "config.json").write_text("{}")
        (directory / "head.safetensors").write_bytes(bytes(100))
    assert verify(FeatureStore.open(store.root)).problems == []
    path = Path(store.root) / "target" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if not is_deleted:
        path.write_bytes(content)
    opened = FeatureStore.open(store.root)
    (problem,) = verify(opened).problems
    assert problem.startswith(f"{Path(store.root) / 'target'}")
    with pytest.raises(StoreError):
        _ = opened.target_directory
