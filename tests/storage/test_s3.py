"""A store on S3."""

from collections.abc import Callable

import pytest

from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore
from specx.storage.verify import verify


def test_what_is_written_is_what_is_read(s3, fill, sequence, assert_same) -> None:
    fill(f"{s3}/store", 7, tokens_per_part=200)
    store = FeatureStore.open(f"{s3}/store")
    reader = FeatureReader(store)
    for i in range(7):
        assert_same(reader.features(i), sequence(i))
    assert verify(store).problems == []
    assert verify(store).unreferenced == []
