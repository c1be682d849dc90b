"""Features as a torch dataset, and as packed batches."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from specx import SpecxError
from specx.storage.catalog.views import ViewWriter
from specx.storage.reader import FeatureReader
from specx.storage.schema import Origin
from specx.storage.store import FeatureStore, open_store
from specx.train.dataset import FeatureDataset, packed_batches


def assert_equal(item: dict[str, torch.Tensor], dataset: FeatureDataset, index: int) -> None:
    """Compare an item with what the store's own reader returns."""
    expected = FeatureReader(FeatureStore.open(dataset._path)).features(index)
    T = dataset.lengths[index]
    for name, found in item.items():
        wanted = getattr(expected, name)[:T]
        bits = found.view(torch.int16).numpy().view(np.uint16) if found.dtype == torch.bfloat16 else found.numpy()
        assert (bits == wanted).all(), name


def test_an_item_has_every_array_in_its_own_type(tiny_store: Path) -> None:
    dataset = FeatureDataset(tiny_store)
    item = dataset[7]
    assert_equal(item, dataset, 7)
    assert {name: tensor.dtype for name, tensor in item.items()} == {
        "aux_hidden": torch.bfloat16,
        "last_hidden": torch.bfloat16,
        "topk_ids": torch.int64,
        "topk_logprob": torch.float16,
        "lse": torch.float32,
        "argmax": torch.int64,
        "input_ids": torch.int64,
        "loss_mask": torch.bool,
    }
    assert item["aux_hidden"].shape == (dataset.lengths[7], 3, 128)
    assert (len(dataset), len(dataset.ids), len(dataset.categories)) == (120, 120, 120)
    assert torch.equal(dataset[-113]["input_ids"], item["input_ids"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_the_process_itself_reads(tiny_store: Path, context: str) -> None:
    dataset = FeatureDataset(tiny_store, arrays=["input_ids", "aux_hidden"], max_length=20)
    assert_equal(dataset[0], dataset, 0)  # a store that was read is forked, too
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context)
    items = list(loader)
    assert len(items) == 120
    assert max(len(item["input_ids"]) for item in items) == 20
    for index in (0, 61, 119):
        assert_equal(items[index], dataset, index)


def test_a_dataset_is_pickled_without_its_store(tiny_store: Path) -> None:
    dataset = FeatureDataset(tiny_store, arrays=["argmax"])
    dataset[0]
    assert len(pickle.dumps(dataset)) < 20_000
    again = copy.copy(dataset)  # by the same state
    assert torch.equal(again[3]["argmax"], dataset[3]["argmax"])


def test_a_view_gives_its_sequences_with_its_masks(store_copy: Path) -> None:
    store = open_store(store_copy)
    catalogue = store.catalogue()
    mask = np.zeros(int(catalogue.length[5]), np.uint8)
    mask[-3:] = 1
    with ViewWriter(store.place, "some") as view:
        for number, own in ((5, mask), (9, None)):
            view.add(bytes(catalogue.ids[number]), own, Origin(category="c", source="s", row=number))
    assert store.views == ("some",)
    dataset = FeatureDataset(store, view="some", arrays=["loss_mask"])
    by_id = {name: dataset[number]["loss_mask"] for number, name in enumerate(dataset.ids)}
    assert by_id[bytes(catalogue.ids[5]).hex()].nonzero().flatten().tolist() == list(range(len(mask) - 3, len(mask)))
    assert set(dataset.categories) == {"c"}
    assert len(dataset) == 2


def test_what_is_not_there_is_named_with_what_is(tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecxError, match="no feature store here"):
        open_store(tmp_path)
    with pytest.raises(SpecxError, match="no view other, there are: none"):
        FeatureDataset(tiny_store, view="other")
    with pytest.raises(SpecxError, match="has no array logits, expected some of aux_hidden, last_hidden"):
        FeatureDataset(tiny_store, arrays=["logits"])
    with pytest.raises(IndexError, match="sequence 120 of 120"):
        FeatureDataset(tiny_store)[120]
    with pytest.raises(SpecxError, match="boundary 2"):
        next(packed_batches(tiny_store, boundaries=[2]))


def test_packed_batches_hold_every_sequence_once_in_an_order_of_the_seed(tiny_store: Path) -> None:
    store = open_store(tiny_store)
    lengths = sorted(store.catalogue().length.tolist())

    def sizes(**options: int) -> list[int]:
        found = []
        for batch in packed_batches(store, batch_tokens=1024, boundaries=(3,), **options):
            assert batch.input_ids.shape[1] <= 1024
            assert batch.aux_hidden.shape[2:] == (1, 128)
            found += torch.bincount(batch.documents.flatten()).tolist()
        return found

    first = sizes()
    assert sorted(first) == lengths
    assert sizes() == first
    assert sizes(seed=1) != first
    assert sizes(epoch=1) != first


def test_a_store_says_what_it_is(tiny_store: Path) -> None:
    store = open_store(tiny_store)
    assert len(store) == 120
    assert repr(store) == f"FeatureStore({str(tiny_store)!r}, 120 sequences, boundaries (1, 3, 5), codec lossless)"
