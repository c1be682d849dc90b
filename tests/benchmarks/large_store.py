"""How a store of a million sequences opens, and how soon its first batch is there.

Sequences are one token long and features tiny, so that what is measured is the bookkeeping. Opened with its index, and
without; peak memory is that of the process that does both the opening and the reading.

    python tests/benchmarks/large_store.py --json
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np


def make(path: Path, count: int) -> float:
    """Write the store; return sequences a second."""
    from specx.storage.schema import DatasetInfo, Origin, SequenceFeatures, TargetIdentity
    from specx.storage.store import FeatureStore
    from specx.storage.writer import FeatureWriter

    info = DatasetInfo(
        target=TargetIdentity(architecture="MadeUpForCausalLM", config_hash="0" * 64, weights_hash="0" * 64),
        compute_dtype="bfloat16",
        boundaries=(1, 2, 3),
        hidden_size=1,
        vocab_size=1 << 30,
        top_k=1,
        codec="lossless",
    )
    store = FeatureStore.create(path, info)
    hidden = np.zeros((1, 1), np.uint16)
    started = time.perf_counter()
    with FeatureWriter(store, tokens_per_part=24_576) as writer:
        for number in range(count):
            ids = np.full(1, number, np.int32)
            features = SequenceFeatures(
                input_ids=ids,
                loss_mask=np.ones(1, np.uint8),
                aux_hidden=np.zeros((1, 3, 1), np.uint16),
                last_hidden=hidden,
                topk_ids=np.zeros((1, 1), np.uint32),
                topk_logprob=np.zeros((1, 1), np.float16),
                lse=np.zeros(1, np.float32),
                argmax=ids,
            )
            writer.add(features, Origin(source=f"file-{number % 7}.parquet", row=number, category="chat"))
    store.records.save_index(unindexed=1)
    return count / (time.perf_counter() - started)


def open_and_read(path: Path) -> dict[str, float]:
    """Open the store, and make the first batch of an epoch."""
    from specx.storage.store import FeatureStore

    started = time.perf_counter()
    store = FeatureStore.open(path)
    sequences = len(store.catalogue())
    opened = time.perf_counter() - started
    opened_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # torch is no part of opening, nor of what is timed.
    from specx.storage.reader import FeatureReader
    from specx.train.config import TrainConfig
    from specx.train.data.corpus import Corpus
    from specx.train.data.datamodule import FeatureData

    started = time.perf_counter() - opened
    corpus = Corpus([FeatureReader(store)], (1, 2, 3))
    data = FeatureData(TrainConfig(store=str(path), out="unused", step_tokens=1024, epochs=1), corpus)
    batch = next(iter(data.train_dataloader()))
    assert batch.num_tokens
    return {
        "sequences": sequences,
        "open_s": round(opened, 3),
        "open_peak_mb": round(opened_mb),
        "first_batch_s": round(time.perf_counter() - started, 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Run one measurement so that no other has left anything behind."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        rate = in_own_process(make, path, arguments.sequences)
        indexed = in_own_process(open_and_read, path)
        shutil.rmtree(path / "index")
        plain = in_own_process(open_and_read, path)
    result = {
        **indexed,
        **{f"without_index_{key}": plain[key] for key in ("open_s", "first_batch_s", "peak_mb")},
        "written_per_s": round(rate),
    }
    if not arguments.json:
        for key, value in result.items():
            print(f"{key:30} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
