"""The estimate of a store's size against stores that were written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specx.storage.ops.info import summary
from specx.storage.ops.size_estimate import Parts, cut, estimate_size, spread
from specx.storage.schema import DatasetInfo
from specx.storage.store import FeatureStore

Fill = Callable[..., FeatureStore]


def tokens_of_parts(store: FeatureStore) -> list[int]:
    return [sum(store.records[unit].sequences.lengths) for unit in sorted(store.records)]


@pytest.mark.parametrize("tokens_per_part", [100, 700, 100_000])
def test_lengths_are_cut_as_the_writer_cuts_them(fill: Fill, tmp_path: Path, tokens_per_part: int) -> None:
    store = fill(tmp_path / "store", 40, tokens_per_part)
    parts = cut(store.catalogue().length, tokens_per_part)
    assert parts.tokens.tolist() == tokens_of_parts(store)
    assert parts.sequences.tolist() == [len(store.records[unit].sequences.ids) for unit in sorted(store.records)]


@pytest.mark.parametrize(("codec", "tokens_per_part"), [("none", 1000), ("none", 5000), ("lossless", 5000)])
def test_every_file_is_foreseen(fill: Fill, tmp_path: Path, codec: str, tokens_per_part: int) -> None:
    store = fill(tmp_path / "store", 140, tokens_per_part, codec)
    expected = estimate_size(store.info, cut(store.catalogue().length, tokens_per_part))
    assert expected.files == sum(path.is_file() for path in store_path(store).rglob("*"))


def test_bytes_without_a_codec_are_those_on_disk(fill: Fill, tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 140, 5000, "none")
    found = summary(store)
    expected = estimate_size(store.info, cut(store.catalogue().length, 5000))
    assert expected.bytes_by_array.keys() == found["bytes_by_array"].keys()
    for name, on_disk in found["bytes_by_array"].items():
        # The text of the metadata differs by some characters from array to array.
        assert expected.bytes_by_array[name] == pytest.approx(on_disk, abs=400 * found["parts"]), name
    written = sum((store_path(store) / "commits" / f"u{unit:06d}.json").stat().st_size for unit in store.records)
    # Names of sources make most of the difference.
    assert expected.commit_bytes == pytest.approx(written, rel=0.4)


def test_raw_bytes_are_the_bytes_of_the_values(fill: Fill, tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 10, 300)
    tokens, parts = int(store.catalogue().length.sum()), len(store.records)
    expected = estimate_size(store.info, cut(store.catalogue().length, 300))
    H, L, K = store.info.hidden_size, len(store.info.boundaries), store.info.top_k
    assert expected.raw_bytes == tokens * (2 * H * (L + 1) + 6 * K + 13) + 10 * 16 + (10 + parts) * 8


def test_gpt_oss_takes_17_kilobytes_a_token_and_its_logits_little_of_it(info: DatasetInfo) -> None:
    shape = info.model_copy(
        update={"hidden_size": 2880, "boundaries": (2, 18, 33), "vocab_size": 201_088, "top_k": 128}
    )
    parts = spread(10_000_000, 7000, 24_576, excess=700)
    by_array = {name: each / 10_000_000 for name, each in estimate_size(shape, parts).bytes_by_array.items()}
    assert sum(by_array.values()) == pytest.approx(16_820, rel=0.01)
    assert by_array["aux_hidden"] + by_array["last_hidden"] == pytest.approx(23_040 / 1.40, rel=0.001)
    assert 300 < by_array["topk_ids"] + by_array["topk_logprob"] < 400


def test_parts_of_unknown_lengths_are_as_many_as_those_of_known_ones() -> None:
    lengths = np.random.default_rng(0).gamma(2.0, 500.0, 5000).astype(int) + 2
    known = cut(lengths, 24_576)
    excess = float((lengths.astype(float) ** 2).sum() / lengths.sum() / 2)
    guessed = spread(int(lengths.sum()), len(lengths), 24_576, excess=excess)
    assert len(guessed.tokens) == pytest.approx(len(known.tokens), rel=0.01)
    assert (guessed.tokens.sum(), guessed.sequences.sum()) == (lengths.sum(), len(lengths))
    assert abs(int(guessed.sequences.max()) - int(np.median(known.sequences))) <= 1


def test_each_writer_ends_with_a_part_of_its_own() -> None:
    parts = spread(100_000, 100, 24_000, excess=500, writers=4)
    assert parts.tokens.tolist() == [24_500, 500] * 4
    assert int(parts.sequences.sum()) == 100


@pytest.mark.parametrize("parts", [cut([], 100), spread(0, 0, 100, excess=0.0)])
def test_no_sequences_take_no_part(info: DatasetInfo, parts: Parts) -> None:
    expected = estimate_size(info, parts)
    assert (expected.parts, expected.bytes, expected.raw_bytes) == (0, 0, 0)


def test_a_sequence_longer_than_a_part_is_a_part() -> None:
    assert cut([500, 500], 100).tokens.tolist() == [500, 500]
    assert spread(1000, 2, 100, excess=250).tokens.tolist() == [500, 500]


def store_path(store: FeatureStore) -> Path:
    return Path(store.root)
