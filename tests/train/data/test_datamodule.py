"""From a store to batches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore
from specx.train.config import TrainConfig
from specx.train.data.batch import PADDING, read_batch
from specx.train.data.corpus import Corpus
from specx.train.data.datamodule import FeatureData, split_sequences


@pytest.fixture(scope="module")
def reader(tiny_store: Path) -> FeatureReader:
    return FeatureReader(FeatureStore.open(tiny_store))


def corpus(reader: FeatureReader, boundaries: tuple[int, ...] = (1, 3, 5)) -> Corpus:
    return Corpus([reader], boundaries)


def config(store: Path, **settings: object) -> TrainConfig:
    return TrainConfig.model_validate({"store": str(store), "out": "unused", "batch_tokens": 2048} | settings)


def test_a_batch_holds_what_the_store_holds(reader: FeatureReader) -> None:
    plan = [[3, 10], [7]]
    lengths = {3: 50, 10: int(reader.catalogue.length[10]), 7: 20}
    batch = read_batch(corpus(reader, (1, 5)), plan, lengths)
    for row, sequences in enumerate(plan):
        start = 0
        for document, sequence in enumerate(sequences):
            stored = reader.features(sequence)
            T = lengths[sequence]
            span = slice(start, start + T)
            assert (batch.documents[row, span] == document).all()
            assert batch.positions[row, span].tolist() == list(range(T))
            assert np.array_equal(batch.input_ids[row, span].numpy(), stored.input_ids[:T])
            assert np.array_equal(batch.loss_mask[row, span].numpy(), stored.loss_mask[:T])
            assert np.array_equal(batch.argmax[row, span].numpy(), stored.argmax[:T])
            assert np.array_equal(batch.lse[row, span].numpy(), stored.lse[:T])
            aux = batch.aux_hidden[row, span].view(torch.int16).numpy().view(np.uint16)
            assert np.array_equal(aux, stored.aux_hidden[:T, [0, 2]])
            last = batch.last_hidden[row, span].view(torch.int16).numpy().view(np.uint16)
            assert np.array_equal(last, stored.last_hidden[:T])
            start += T
        assert (batch.documents[row, start:] == PADDING).all()
        assert not batch.loss_mask[row, start:].any()


def test_the_holdout_is_never_trained_on_and_is_the_same_in_every_run(reader: FeatureReader) -> None:
    split = split_sequences(corpus(reader), 0.2)
    assert 10 <= len(split.holdout) <= 40
    assert sorted([*split.train, *split.holdout]) == list(range(len(reader.catalogue)))
    larger = split_sequences(corpus(reader), 0.3)
    assert set(split.holdout) <= set(larger.holdout)
    data = FeatureData(config(reader.store.root, holdout_fraction=0.2), corpus(reader))
    planned = {sequence for plan in data.plans for row in plan for sequence in row}
    assert planned == set(split.train.tolist())


def test_batches_go_on_from_a_saved_position(reader: FeatureReader) -> None:
    first = FeatureData(config(reader.store.root, max_steps=6), corpus(reader))
    batches = [batch.input_ids for batch in first.train_dataloader()]
    assert len(batches) == 6
    loader = FeatureData(config(reader.store.root, max_steps=6), corpus(reader)).train_dataloader()
    loader.load_state_dict({"next_batch": 4})
    resumed = [batch.input_ids for batch in loader]
    assert len(resumed) == 2
    assert all(torch.equal(a, b) for a, b in zip(batches[4:], resumed, strict=True))


def test_max_length_cuts_sequences_and_their_batches(reader: FeatureReader) -> None:
    data = FeatureData(config(reader.store.root, max_length=64, max_steps=2), corpus(reader))
    for batch in data.train_dataloader():
        assert int(batch.positions.max()) == 63


def test_leaving_the_loop_early_ends_the_reading_thread(reader: FeatureReader) -> None:
    import threading

    data = FeatureData(config(reader.store.root), corpus(reader))
    batches = iter(data.train_dataloader())
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batch reader"]


def test_damage_met_by_the_reading_thread_is_raised_in_the_loop(store_copy: Path) -> None:
    from specx.storage.errors import StoreCorruptError

    for shard in store_copy.glob("parts/*/aux_hidden/c/0/0/0"):
        content = bytearray(shard.read_bytes())
        content[1000] ^= 1
        shard.write_bytes(content)
    reader = FeatureReader(FeatureStore.open(store_copy))
    data = FeatureData(config(store_copy), corpus(reader))
    with pytest.raises(StoreCorruptError, match="checksum of chunk"):
        list(data.train_dataloader())
