"""Stores with lossy codecs, without last hidden states, and with other numbers of boundaries."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from specx.storage.codecs.quantization import QuantizationError, from_bits, to_bits
from specx.storage.errors import StoreCorruptError
from specx.storage.ops.info import summary
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.schema import DatasetInfo, Origin, SequenceFeatures
from specx.storage.store import FeatureStore
from specx.storage.writer import FeatureWriter

MakeFeatures = Callable[[int, int], SequenceFeatures]


def finite(features: SequenceFeatures, seed: int) -> SequenceFeatures:
    """Replace random bits, which hold NaN, by values as a model has them."""
    random = np.random.default_rng(seed)
    aux, last = (
        to_bits(random.standard_normal(rows.shape).astype(np.float32))
        for rows in (features.aux_hidden, features.last_hidden)
        if rows is not None
    )
    return replace(features, aux_hidden=aux, last_hidden=last)


@pytest.fixture
def filled(tmp_path: Path, info: DatasetInfo, make_features: MakeFeatures) -> Callable[..., FeatureStore]:
    """Return a store of 6 sequences in two parts, of several chunks, with other settings."""

    def fill(**settings: object) -> FeatureStore:
        changed = info.model_copy(update=settings)
        store = FeatureStore.create(tmp_path / "store", changed)
        with FeatureWriter(store, tokens_per_part=1500) as writer:
            for i in range(6):
                features = finite(make_features(500, i), i)
                if not changed.last_hidden:
                    features = replace(features, last_hidden=None)
                features = replace(features, aux_hidden=features.aux_hidden[:, : len(changed.boundaries)])
                writer.add(features, Origin(source="made-up", row=i))
        return store

    return fill


@pytest.mark.parametrize(("codec", "limit"), [("int8", 0.01), ("fp8", 0.04)])
def test_a_lossy_store_is_smaller_close_and_says_how_close(
    filled: Callable[..., FeatureStore], make_features: MakeFeatures, codec: str, limit: float
) -> None:
    store = filled(codec=codec)
    reader = FeatureReader(FeatureStore.open(store.root))
    errors = {"aux_hidden": QuantizationError(), "last_hidden": QuantizationError()}
    for i in range(6):
        found, expected = reader.features(i), finite(make_features(500, i), i)
        for name, rows in expected.arrays().items():
            if name in errors:
                errors[name].add(rows, found.arrays()[name])
            else:
                assert found.arrays()[name].tobytes() == rows.tobytes(), name
    told = summary(store)["quantization_error"]
    assert told.keys() == errors.keys()
    for name, error in errors.items():
        assert 0 < error.relative < limit
        # Told from one token of 16.
        assert told[name] == pytest.approx(error.relative, rel=0.15)
    assert [record.quantization_error.keys() for record in store.records.values()] == [errors.keys()] * 2
    assert verify(store).problems == []


@pytest.mark.parametrize("codec", ["lossless", "zstd", "none"])
def test_codecs_that_keep_every_bit_have_no_error(filled: Callable[..., FeatureStore], codec: str) -> None:
    assert summary(filled(codec=codec))["quantization_error"] == {}


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_plain_zarr_reads_a_lossy_store(filled: Callable[..., FeatureStore], codec: str) -> None:
    store = filled(codec=codec)
    reader = FeatureReader(store)
    group = zarr.open_group(store.part_path(store.records[0]), mode="r")
    for name, rows in reader.features(1).arrays().items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert np.asarray(array[500:1000]).tobytes() == rows.tobytes(), name
    metadata = (Path(store.part_path(store.records[0])) / "aux_hidden" / "zarr.json").read_text()
    assert f'"specx.{codec}"' in metadata


def read_first_part(store: FeatureStore) -> None:
    for sequence in range(3):
        FeatureReader(store).features(sequence)


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_a_flipped_byte_of_a_lossy_array_is_never_a_value(filled: Callable[..., FeatureStore], codec: str) -> None:
    store = filled(codec=codec)
    path = next((Path(store.part_path(store.records[0])) / "last_hidden" / "c").rglob("0"))
    path = next(each for each in (path, *path.rglob("*")) if each.is_file())
    content = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(content), 20).tolist():
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(StoreCorruptError):
            read_first_part(FeatureStore.open(store.root))
    path.write_bytes(content)
    FeatureReader(FeatureStore.open(store.root)).features(0)


@pytest.mark.parametrize("boundaries", [(1,), (1, 2)])
def test_a_store_without_last_hidden_and_with_fewer_boundaries(
    filled: Callable[..., FeatureStore], make_features: MakeFeatures, boundaries: tuple[int, ...]
) -> None:
    store = filled(last_hidden=False, boundaries=boundaries)
    features = FeatureReader(store).features(3)
    assert features.last_hidden is None
    expected = finite(make_features(500, 3), 3).aux_hidden[:, : len(boundaries)]
    assert np.array_equal(features.aux_hidden, expected)
    assert not (Path(store.part_path(store.records[0])) / "last_hidden").exists()
    assert summary(store)["last_hidden"] is False
    assert verify(store).problems == []


def test_features_other_than_the_store_s_are_refused(
    tmp_path: Path, info: DatasetInfo, make_features: MakeFeatures
) -> None:
    store = FeatureStore.create(tmp_path / "store", info)
    with pytest.raises(ValueError, match="last_hidden"), FeatureWriter(store, tokens_per_part=100) as writer:
        writer.add(replace(make_features(10, 0), last_hidden=None), Origin(source="made-up", row=0))


def test_values_are_rounded_to_bfloat16_again(filled: Callable[..., FeatureStore]) -> None:
    rows = FeatureReader(filled(codec="int8")).features(0).aux_hidden
    assert rows.dtype == np.uint16
    assert np.isfinite(from_bits(rows)).all()
