"""What is measured of a store is what is in it."""

import numpy as np
import pytest
import torch

from specx.report.sample import POSITION_EDGES, coverage, measure
from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore


@pytest.fixture(scope="module")
def reader(tiny_store: object) -> FeatureReader:
    return FeatureReader(FeatureStore.open(str(tiny_store)))


def test_sizes_of_hidden_states_are_those_of_the_tokens_in_each_bucket(
    reader: FeatureReader,
) -> None:
    measured = measure(reader, sequences=1000, tokens=10**9)
    assert (measured.sequences, measured.tokens) == (120, int(reader.catalogue.length.sum()))
    assert list(measured.rms) == ["boundary 1", "boundary 3", "boundary 5", "last hidden"]
    hidden, position = [], []
    for sequence in range(120):
        features = reader.features(sequence)
        hidden.append(torch.from_numpy(features.aux_hidden[:, 1].copy()).view(torch.bfloat16).double())
        position.append(torch.arange(len(hidden[-1])))
    square, where = torch.cat(hidden).square().mean(1), torch.cat(position)
    for bucket, (start, end) in enumerate(zip(POSITION_EDGES, [*POSITION_EDGES[1:], 1 << 40], strict=True)):
        there = (where >= start) & (where < end)
        found = measured.rms["boundary 3"][bucket]
        if there.any():
            assert found == pytest.approx(float(square[there].mean().sqrt()), rel=1e-6)
        else:
            assert np.isnan(found)


def test_the_probability_of_the_top_k_adds_up(reader: FeatureReader) -> None:
    measured = measure(reader, sequences=1000)
    logprobs = np.concatenate([reader.features(sequence).topk_logprob for sequence in range(120)])
    mass = np.exp(logprobs.astype(np.float64)).cumsum(1)
    np.testing.assert_allclose(measured.mass, mass.mean(0), rtol=1e-4)
    np.testing.assert_allclose(measured.low_mass, np.quantile(mass, 0.1, axis=0), rtol=1e-4)
    assert np.all(np.diff(measured.mass) >= 0)


def test_a_sample_is_bounded_and_the_same_for_the_same_seed(reader: FeatureReader) -> None:
    first, again, other = (measure(reader, seed=seed, sequences=8, tokens=600) for seed in (0, 0, 1))
    assert first.sequences <= 8
    assert first.tokens == 600
    np.testing.assert_array_equal(first.mass, again.mass)
    assert not np.array_equal(first.mass, other.mass)


def test_coverage_counts_supervised_tokens(reader: FeatureReader) -> None:
    counts = np.zeros(reader.store.info.vocab_size, np.int64)
    for sequence in range(120):
        features = reader.features(sequence)
        np.add.at(counts, features.input_ids[features.loss_mask == 1], 1)
    covered = coverage(reader)
    assert covered.is_whole
    assert covered.tokens == counts.sum()
    np.testing.assert_allclose(covered.share, np.sort(counts)[::-1].cumsum() / counts.sum())
    part = coverage(reader, tokens=1)
    assert not part.is_whole
    assert 0 < part.tokens < covered.tokens
    assert part.share[-1] == 1.0
