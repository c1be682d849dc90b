"""The draft vocabulary."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore
from specx.train.data.corpus import Corpus
from specx.train.data.draft_vocabulary import draft_vocabulary, membership, offsets, token_counts


def test_the_most_frequent_tokens_are_chosen_and_lower_ids_win_ties() -> None:
    counts = np.array([5, 0, 7, 5, 9])
    assert draft_vocabulary(counts, 3).tolist() == [0, 2, 4]


def test_offsets_lead_back_to_target_ids_and_membership_marks_them() -> None:
    vocabulary = np.array([0, 3, 4, 9])
    assert (np.arange(4) + offsets(vocabulary)).tolist() == vocabulary.tolist()
    assert np.flatnonzero(membership(vocabulary, 12)).tolist() == vocabulary.tolist()


def test_only_supervised_tokens_are_counted(tiny_store: Path, regen: Path) -> None:
    reader = FeatureReader(FeatureStore.open(tiny_store))
    counts = token_counts(Corpus([reader], (1,)), 0, np.arange(len(reader.catalogue)))
    rows = pq.read_table(regen / "train.parquet").slice(0, 120).to_pylist()
    expected = np.zeros(2048, np.int64)
    for row in rows:
        for token, supervised in zip(row["input_ids"], row["loss_mask"], strict=True):
            expected[token] += supervised
    assert np.array_equal(counts, expected)
