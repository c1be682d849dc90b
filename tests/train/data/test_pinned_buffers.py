"""Memory that batches use again, and never while it is in use."""

import itertools
from pathlib import Path

import numpy as np
import torch

from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore
from specx.train.config import TrainConfig
from specx.train.data.batch import Batch, read_batch
from specx.train.data.corpus import Corpus
from specx.train.data.datamodule import FeatureData
from specx.train.data.pinned_buffers import Buffers
from specx.train.data.prefetch import BATCHES_IN_MEMORY

UINT16 = np.dtype(np.uint16)


def same(one: Batch, other: Batch) -> bool:
    """Bit for bit, padding too."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in Batch.__slots__]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_memory_is_used_again_once_array_and_tensors_are_gone() -> None:
    buffers = Buffers()
    array = buffers.take("x", (4, 5), UINT16)
    place = array.ctypes.data
    tensor = torch.from_numpy(array).view(torch.bfloat16)[1:].permute(1, 0)
    del array
    other = buffers.take("x", (4, 5), UINT16)
    assert other.ctypes.data != place
    del tensor
    smaller = buffers.take("x", (3,), UINT16)
    assert smaller.ctypes.data == place
    assert smaller.shape == (3,)


def test_what_has_become_too_small_is_not_used_again() -> None:
    buffers = Buffers()
    array = buffers.take("x", (4,), UINT16)
    del array
    larger = buffers.take("x", (400,), UINT16)
    larger[:] = 7
    assert int(larger.sum()) == 2800


def test_a_run_reads_the_same_batches_from_few_buffers_whatever_is_kept_of_them(tiny_store: Path) -> None:
    corpus = Corpus([FeatureReader(FeatureStore.open(tiny_store))], (1, 3, 5))
    config = TrainConfig(store=str(tiny_store), out="unused", epochs=3, step_tokens=1024)
    data = FeatureData(config, corpus)
    sizes, places = [], []
    kept = []
    for number, batch in enumerate(itertools.islice(data.train_dataloader(), 60)):
        expected = read_batch(corpus, data.step_plans(number + 1)[0], data.lengths)
        assert same(batch, expected)
        sizes.append(batch.aux_hidden.numel())
        places.append(batch.aux_hidden.data_ptr())
        if number % 20 == 0:
            kept.append((batch, expected))
    assert all(same(*pair) for pair in kept)
    # From the largest batch on, new buffers fit every batch; there may be as many that are older and smaller.
    largest = sizes.index(max(sizes))
    assert largest < 30
    assert len(set(places[largest:])) <= 2 * (BATCHES_IN_MEMORY + len(kept))
