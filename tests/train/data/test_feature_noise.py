"""Noise on the features, by its definition."""

from dataclasses import replace

import pytest
import torch

from specx.train.data.batch import PADDING, Batch
from specx.train.data.feature_noise import with_uniform_noise
from specx.train.families.spec import DraftSpec

from ..conftest import make_spec


@pytest.fixture
def spec() -> DraftSpec:
    return make_spec()


def test_noise_is_uniform_and_scaled_by_the_length_of_the_sequence(batch: Batch) -> None:
    for features in (batch.last_hidden.float(), batch.aux_hidden.float()):
        noisy = with_uniform_noise(features, batch, 0.1)
        for row, document, length in ((0, 0, 13), (0, 1, 7), (1, 0, 22)):
            drawn = (noisy - features)[row, batch.documents[row] == document]
            half_width = 0.1 * 512 / length
            assert 0.95 * half_width < drawn.abs().max() <= 1.0001 * half_width
            assert drawn.abs().mean() == pytest.approx(half_width / 2, rel=0.1)
            assert abs(drawn.mean()) < 0.1 * half_width


def test_the_noise_of_a_sequence_is_that_of_its_seed_wherever_it_is(batch: Batch) -> None:
    noise = with_uniform_noise(batch.aux_hidden, batch, 0.1)
    assert noise.dtype == torch.bfloat16
    assert torch.equal(noise, with_uniform_noise(batch.aux_hidden, batch, 0.1))
    one = batch.documents[0] == 1
    alone = replace(
        batch,
        documents=torch.zeros(1, int(one.sum()), dtype=torch.int64),
        seeds=batch.seeds[:1, 1:],
    )
    assert torch.equal(with_uniform_noise(batch.aux_hidden[:1, one], alone, 0.1), noise[:1, one])
    other = replace(batch, seeds=batch.seeds + 1)
    assert not torch.equal(with_uniform_noise(batch.aux_hidden, other, 0.1)[:, :7], noise[:, :7])


def test_padding_has_no_noise(batch: Batch) -> None:
    noisy = with_uniform_noise(batch.aux_hidden, batch, 0.1)
    assert torch.equal(noisy[batch.documents == PADDING], batch.aux_hidden[batch.documents == PADDING])
