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
from specx.train.data.packing import BatchPlan


@pytest.fixture(scope="module")
def reader(tiny_store: Path) -> FeatureReader:
    return FeatureReader(FeatureStore.open(tiny_store))


def corpus(reader: FeatureReader, boundaries: tuple[int, ...] = (1, 3, 5)) -> Corpus:
    return Corpus([reader], boundaries)


def config(store: Path, **settings: object) -> TrainConfig:
    return TrainConfig.model_validate({"store": str(store), "out": "unused", "step_tokens": 2048} | settings)


def test_a_batch_holds_what_the_store_holds(reader: FeatureReader) -> None:
    lengths = {3: 50, 10: int(reader.catalogue.length[10]), 7: 20}
    batch = read_batch(corpus(reader, (1, 5)), BatchPlan((3, 10, 7), seeds=(5, 6, 7)), lengths)
    start = 0
    for document, sequence in enumerate((3, 10, 7)):
        stored = reader.features(sequence)
        T = lengths[sequence]
        span = slice(start, start + T)
        assert (batch.documents[0, span] == document).all()
        assert batch.positions[0, span].tolist() == list(range(T))
        assert np.array_equal(batch.input_ids[0, span].numpy(), stored.input_ids[:T])
        assert np.array_equal(batch.loss_mask[0, span].numpy(), stored.loss_mask[:T])
        assert np.array_equal(batch.argmax[0, span].numpy(), stored.argmax[:T])
        assert np.array_equal(batch.lse[0, span].numpy(), stored.lse[:T])
        aux = batch.aux_hidden[0, span].view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(aux, stored.aux_hidden[:T, [0, 2]])
        last = batch.last_hidden[0, span].view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(last, stored.last_hidden[:T])
        start += T
    assert batch.documents.shape == (1, start)
    assert batch.seeds.tolist() == [[5, 6, 7]]


def test_a_batch_of_no_sequence_is_a_token_of_padding(reader: FeatureReader) -> None:
    batch = read_batch(corpus(reader), BatchPlan(()), [])
    assert batch.documents.tolist() == [[PADDING]]
    assert not batch.loss_mask.any()
    assert not batch.aux_hidden.any()
    assert batch.seeds.shape == (1, 0)


@pytest.mark.parametrize(("devices", "batch_tokens"), [(1, 4096), (1, 700), (2, 4096), (2, 900), (8, 500)])
def test_devices_and_batches_split_a_step_and_decide_nothing_else(
    reader: FeatureReader, devices: int, batch_tokens: int
) -> None:
    """Each token is trained on once an epoch, in the same step and with the same seed however steps are split."""
    one = FeatureData(config(reader.store.root, epochs=2), corpus(reader))
    data = FeatureData(config(reader.store.root, epochs=2, batch_tokens=batch_tokens), corpus(reader), devices)
    assert data.plan == one.plan
    assert one.batches_per_step == 1
    times = np.zeros(len(reader.catalogue), np.int64)
    for step in range(1, data.steps + 1):
        plans = data.step_plans(step)
        assert len(plans) == data.batches_per_step == devices * data.accumulated
        for plan in plans:
            tokens = sum(data.lengths[sequence] for sequence in plan.sequences)
            assert tokens <= batch_tokens or len(plan.sequences) == 1
            np.add.at(times, list(plan.sequences), 1)
        seeds = {pair for plan in plans for pair in zip(plan.sequences, plan.seeds, strict=True)}
        (whole,) = one.step_plans(step)
        assert seeds == set(zip(whole.sequences, whole.seeds, strict=True))
    assert (times[data.split.train] == 2).all()
    assert not times[data.split.holdout].any()


def test_held_out_sequences_keep_their_seeds_in_whatever_batches(reader: FeatureReader) -> None:
    pairs = []
    for batch_tokens in (600, 16_384):
        data = FeatureData(config(reader.store.root, holdout_fraction=0.3, batch_tokens=batch_tokens), corpus(reader))
        pairs.append([pair for plan in data.holdout_plans for pair in zip(plan.sequences, plan.seeds, strict=True)])
    assert set(pairs[0]) == set(pairs[1])
    assert len(set(pairs[0])) == len(pairs[0]) == len(data.split.holdout)


def test_sequences_longer_than_a_batch_are_named_once(reader: FeatureReader) -> None:
    data = FeatureData(config(reader.store.root), corpus(reader))
    assert data.oversized() is None
    longest = int(np.argmax(reader.catalogue.length))
    tokens = int(reader.catalogue.length[longest])
    data = FeatureData(config(reader.store.root, batch_tokens=tokens - 1), corpus(reader))
    line = data.oversized()
    assert line.startswith(f"{reader.store.root}/parts/")
    assert f"sequence {bytes(reader.catalogue.ids[longest]).hex()} has {tokens} tokens" in line
    assert f"--batch-tokens {tokens}" in line
    assert "--max-length" in line
    assert "\n" not in line
    cut = config(reader.store.root, batch_tokens=tokens - 1, max_length=tokens - 1)
    assert FeatureData(cut, corpus(reader)).oversized() is None


def test_the_holdout_is_never_trained_on_and_is_the_same_in_every_run(reader: FeatureReader) -> None:
    split = split_sequences(corpus(reader), 0.2)
    assert 10 <= len(split.holdout) <= 40
    assert sorted([*split.train, *split.holdout]) == list(range(len(reader.catalogue)))
    larger = split_sequences(corpus(reader), 0.3)
    assert set(split.holdout) <= set(larger.holdout)
    data = FeatureData(config(reader.store.root, holdout_fraction=0.2), corpus(reader))
    planned = {sequence for step in data.plan for sequence in step}
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
