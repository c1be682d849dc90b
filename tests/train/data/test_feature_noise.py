"""Noise on the features, by its definition."""

import pytest
import torch

from specx.train.data.batch import Batch
from specx.train.data.feature_noise import with_uniform_noise
from specx.train.families.spec import DraftSpec

from ..conftest import make_spec


@pytest.fixture
def spec() -> DraftSpec:
    return make_spec()


def test_noise_is_uniform_and_scaled_by_the_length_of_the_sequence(batch: Batch) -> None:
    for features in (batch.last_hidden.float(), batch.aux_hidden.float()):
        noisy = with_uniform_noise(features, batch, 0.1, torch.Generator().manual_seed(0))
        for row, document, length in ((0, 0, 13), (0, 1, 7), (1, 0, 22)):
            drawn = (noisy - features)[row, batch.documents[row] == document]
            half_width = 0.1 * 512 / length
            assert 0.95 * half_width < drawn.abs().max() <= 1.0001 * half_width
            assert drawn.abs().mean() == pytest.approx(half_width / 2, rel=0.1)
            assert abs(drawn.mean()) < 0.1 * half_width


def test_a_generator_in_the_same_state_gives_the_same_noise(batch: Batch) -> None:
    first, second, other = (
        with_uniform_noise(batch.aux_hidden, batch, 0.1, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
