"""From data to a trained draft with the store on S3, over a network that loses 5 % of what is written."""

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run as extract
from specx.storage.ops.verify import verify
from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore
from specx.train.config import TrainConfig
from specx.train.data.batch import Batch
from specx.train.data.corpus import Corpus
from specx.train.data.datamodule import FeatureData
from specx.train.pipeline import run as train


def assert_same_batches(local: FeatureStore, remote: str) -> None:
    """The first 50 batches are the same to the bit, with room for two parts on the local disk."""
    part_bytes = max(sum(one.size for one in record.objects) for record in local.records.values())
    opened = FeatureStore.open(remote, cache_bytes=2 * part_bytes)
    assert len(opened.records) > 2
    config = TrainConfig(store="", out="", epochs=30, step_tokens=512, shuffle_parts=2, holdout_fraction=0.0)
    loaders = [
        FeatureData(config, Corpus([FeatureReader(store)], store.info.boundaries)).train_dataloader()
        for store in (local, opened)
    ]
    batches = list(itertools.islice(zip(*loaders, strict=True), 50))
    assert len(batches) == 50
    for one, other in batches:
        for name in Batch.__slots__:
            found, expected = getattr(other, name), getattr(one, name)
            assert (found is None) == (expected is None), name
            if expected is not None:
                assert torch.equal(*(each.contiguous().view(torch.uint8) for each in (found, expected))), name


def test_a_draft_is_trained_from_a_store_on_s3_that_equals_the_local_one(
    s3: str, s3_faults: Any, target: Path, regen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))

    def configured(store: str, limit: int) -> ExtractConfig:
        data = (str(regen / "train.parquet"),)
        return ExtractConfig(target=str(target), data=data, store=store, limit=limit, tokens_per_part=1000)

    s3_faults.lose(0.05, seed=0)
    assert extract(configured(f"{s3}/store", 8)).sequences == 8
    again = extract(configured(f"{s3}/store", 12))
    assert (again.sequences, again.reused) == (4, 8)
    assert s3_faults.lost > 0
    s3_faults.stop()

    for limit in (8, 12):
        extract(configured(str(tmp_path / "store"), limit))
    local, remote = FeatureStore.open(tmp_path / "store"), FeatureStore.open(f"{s3}/store")
    assert verify(remote).problems == []
    assert [record.objects for record in remote.records.values()] == [
        record.objects for record in local.records.values()
    ]
    assert remote.place.sizes("target") == local.place.sizes("target")

    summaries = [
        train(
            TrainConfig(store=store.root, out=str(tmp_path / out), max_steps=3, step_tokens=1024, draft_vocab_size=512)
        )
        for store, out in ((local, "local"), (remote, "remote"))
    ]
    assert summaries[0].loss == summaries[1].loss
    assert_same_batches(local, f"{s3}/store")
    del remote
    gc.collect()
    assert [path for path in (tmp_path / "temporary").iterdir() if path.name.startswith("specx-")] == []
