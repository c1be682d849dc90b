"""Several stores in one run: what is drawn from each, and which go together."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run as extract
from specx.storage.ops.prune import prune, pruned_info
from specx.storage.ops.select import Filter, select
from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore
from specx.train.config import TrainConfig
from specx.train.data.batch import read_batch
from specx.train.data.corpus import Corpus
from specx.train.data.datamodule import FeatureData, split_sequences
from specx.train.data.packing import BatchPlan, drawn
from specx.train.errors import TrainError
from specx.train.loop.run_directory import RunDirectory
from specx.train.pipeline import run

BOUNDARIES = (1, 3, 5)


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory, target: Path, regen: Path) -> Path:
    """A store of 40 answers, the first 20 of ``tiny_store`` and 20 of another file, with a boundary more."""
    store = tmp_path_factory.mktemp("other") / "store"
    for name in ("train", "dev"):
        data = (str(regen / f"{name}.parquet"),)
        boundaries = (1, 2, 3, 5)
        extract(ExtractConfig(target=str(target), data=data, store=str(store), limit=20, boundaries=boundaries))
    return store


@pytest.fixture
def corpus(tiny_store: Path, other_store: Path) -> Corpus:
    return Corpus([FeatureReader(FeatureStore.open(store)) for store in (tiny_store, other_store)], BOUNDARIES)


def settings(stores: tuple[Path, ...], out: Path, **changes: object) -> TrainConfig:
    base = {
        "store": [str(store) for store in stores],
        "out": str(out),
        "max_steps": 4,
        "step_tokens": 1024,
        "draft_vocab_size": 256,
        "ttt_steps": 2,
        "log_every": 1,
    }
    return TrainConfig.model_validate(base | changes)


def test_a_batch_holds_what_each_store_holds(corpus: Corpus) -> None:
    sequences = (3, 125, 150, 7)
    batch = read_batch(corpus, BatchPlan(sequences), corpus.length.tolist())
    start = 0
    for sequence in sequences:
        reader, number = corpus.locate(sequence)
        columns = [reader.store.info.boundaries.index(boundary) for boundary in BOUNDARIES]
        stored = reader.features(number)
        stop = start + len(stored.input_ids)
        aux = batch.aux_hidden[0, start:stop].view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(aux, stored.aux_hidden[:, columns])
        assert np.array_equal(batch.input_ids[0, start:stop].numpy(), stored.input_ids)
        start = stop


def test_no_part_of_one_store_is_taken_for_one_of_another(corpus: Corpus) -> None:
    own = {tuple(pair) for pair in zip(corpus.store.tolist(), corpus.unit.tolist(), strict=True)}
    assert len(own) == len(set(corpus.unit.tolist()))


def test_what_two_stores_have_is_held_out_in_both_and_validated_on_once(corpus: Corpus) -> None:
    split = split_sequences(corpus, 0.3)
    held, trained = ({bytes(each) for each in corpus.ids[numbers]} for numbers in (split.holdout, split.train))
    assert not held & trained
    assert len(held) == len(split.holdout)
    assert len(split.holdout) + len(split.train) < len(corpus), "some held-out sequences are in both stores"


@pytest.mark.parametrize("weight", [0.3, 0.5, 1.0, 1.7, 2.0])
def test_a_weight_is_the_number_of_passes_in_an_epoch(weight: float) -> None:
    sequences = np.arange(100, 140)
    epochs = [drawn(sequences, weight, (0, 0), epoch) for epoch in range(10)]
    assert {len(epoch) for epoch in epochs} == {round(40 * weight)}
    times = np.bincount(np.concatenate(epochs) - 100, minlength=40)
    assert times.tolist() == [round(10 * weight)] * 40, "nothing is preferred in the long run"
    assert np.array_equal(epochs[3], drawn(sequences, weight, (0, 0), 3))
    if weight < 1:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], drawn(sequences, weight, (1, 0), 0))


def test_stores_are_drawn_from_by_their_weights(corpus: Corpus) -> None:
    config = settings((Path("a"), Path("b")), Path("out"), max_steps=None, epochs=4, weights=[0.25, 2], seed=3)
    data = FeatureData(config, corpus)
    met = np.array([sequence for step in data.plan for sequence in step])
    split = split_sequences(corpus, config.holdout_fraction)
    for store, passes in ((0, 1), (1, 8)):
        own = split.train[corpus.store[split.train] == store]
        times = np.bincount(met, minlength=len(corpus))[own]
        assert times.tolist() == [passes] * len(own)


def test_a_run_of_two_stores_trains_and_is_resumed_with_both(
    tmp_path: Path, tiny_store: Path, other_store: Path, loss_curve: Callable[..., dict[int, float]]
) -> None:
    out = tmp_path / "run"
    config = settings((tiny_store, other_store), out, weights=(1, 2), checkpoint_every=2, boundaries=BOUNDARIES)
    assert run(config).steps == 4
    expected = loss_curve(out)
    assert [len(record.units) for record in RunDirectory(out).record().stores] == [3, 2]
    (out / "result.json").unlink()
    (out / "checkpoints" / "last.ckpt").unlink()
    assert run(config).steps == 4
    assert loss_curve(out) == expected
    with pytest.raises(TrainError, match="begun with 2 stores, now there are 1"):
        run(config.model_copy(update={"store": (str(tiny_store),), "weights": ()}))


def test_one_store_may_stand_in_a_run_file_without_a_list(tiny_store: Path) -> None:
    config = TrainConfig.model_validate({"store": "S", "out": "O", "weights": 2})
    assert (config.store, config.weights) == (("S",), (2.0,))
    with pytest.raises(ValueError, match="2 weights of 1 stores"):
        TrainConfig.model_validate({"store": "S", "out": "O", "weights": [1, 2]})


def test_stores_that_do_not_go_together_are_refused_by_name(
    tmp_path: Path, tiny_store: Path, store_copy: Path, other_store: Path
) -> None:
    def refusal(stores: tuple[Path, ...], **changes: object) -> str:
        with pytest.raises(TrainError) as caught:
            run(settings(stores, tmp_path / "run", **changes))
        return str(caught.value)

    message = refusal((other_store, tiny_store))
    assert message.startswith(f"{tiny_store}: boundary 2 is not in the store, which has 1,3,5")
    opened = FeatureStore.open(store_copy)
    narrow = tmp_path / "narrow"
    prune(
        opened,
        FeatureStore.create(narrow, pruned_info(opened.info, boundaries=None, codec=None, last_hidden=False)),
        tokens_per_part=10_000,
    )
    message = refusal((tiny_store, narrow))
    assert f"{narrow}: only the top 128 logits kept, but {tiny_store}: last hidden states kept" in message
    other = opened.info.model_copy(update={"target": opened.info.target.model_copy(update={"weights_hash": "0" * 64})})
    (store_copy / "dataset.json").write_bytes(other.sealed().to_bytes())
    assert f"{store_copy}: made by another target than {tiny_store}" in refusal((tiny_store, store_copy))
    assert not (tmp_path / "run").exists()


def test_views_choose_from_the_stores_that_have_them(tmp_path: Path, store_copy: Path, other_store: Path) -> None:
    opened = FeatureStore.open(store_copy)
    select(opened, "few", Filter(limit=10))
    out = tmp_path / "run"
    run(settings((store_copy, other_store), out, view=["few"], boundaries=BOUNDARIES, max_steps=1))
    files = [record["view_files"] for record in json.loads((out / "run.json").read_text())["stores"]]
    assert len(files[0]) == 1
    assert files[1] == []
    with pytest.raises(TrainError, match="no view many in any"):
        run(settings((store_copy, other_store), tmp_path / "another", view=["many"]))
