"""What the store takes of disk, processor and memory, and how fast it is read in random order.

150 sequences of 200 to 2048 tokens at hidden size 2880, three boundaries and the last hidden state, top-128. The
values are real: states of the trained tiny target, those of 23 tokens side by side to the full width. They are
compared with the raw bytes in one memory map an array, and with one safetensors file a sequence read by a
DataLoader. Reads end in packed batches of four sequences and take turns, each in a process of its own that goes
through everything twice: the second time, when files and memory are warm, counts. Memory of batches is used again, as
in a run of training; a DataLoader's processes, which stay, give theirs away.

    python tests/benchmarks/store.py --json
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from sequences import H, K, V, load_pool, make_pool, wide_length, wide_sequence

BATCH = 4
TOKENS_PER_PART = 24_576
CODECS = ("int8", "fp8", "lossless", "zstd", "none")


def sequences(workspace: Path, count: int) -> Iterator[Any]:
    """Yield made-up sequences of real values, the same each time."""
    from specx.storage.schema import SequenceFeatures

    pool = load_pool(workspace)
    for number in range(count):
        yield SequenceFeatures(**wide_sequence(pool, number))


def new_store(path: Path, codec: str) -> Any:
    """Create an empty store for the sequences."""
    from specx.storage.schema import DatasetInfo, TargetIdentity
    from specx.storage.store import FeatureStore

    info = DatasetInfo(
        target=TargetIdentity(architecture="GptOssForCausalLM", config_hash="0" * 64, weights_hash="0" * 64),
        compute_dtype="bfloat16",
        boundaries=(2, 18, 33),
        hidden_size=H,
        vocab_size=V,
        top_k=K,
        codec=codec,
    )
    return FeatureStore.create(path, info)


def write_store(workspace: Path, count: int, codec: str) -> dict[str, float]:
    """Write a store; return its size, error, processor seconds beyond making the values, and peak memory."""
    from specx.storage.ops.info import summary
    from specx.storage.schema import Origin
    from specx.storage.writer import FeatureWriter

    store = new_store(workspace / codec, codec)
    raw = cpu = 0.0
    with FeatureWriter(store, tokens_per_part=TOKENS_PER_PART) as writer:
        for number, features in enumerate(sequences(workspace, count)):
            raw += sum(rows.nbytes for rows in features.arrays().values())
            started = time.process_time()
            writer.add(features, Origin(source="made-up", row=number))
            cpu += time.process_time() - started
        started = time.process_time()
    cpu += time.process_time() - started
    found = summary(store)
    return {
        "over_raw": found["bytes"] / raw,
        "error": max(found["quantization_error"].values(), default=0.0),
        "cpu_s_per_gb": cpu / raw * 1e9,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def write_memmap(workspace: Path, count: int) -> dict[str, float]:
    """Write the raw bytes of every array into one file; return processor seconds a GB."""
    total = sum(wide_length(number) for number in range(count))
    (workspace / "memmap").mkdir()
    maps: dict[str, Any] = {}
    raw = cpu = 0.0
    at = 0
    for features in sequences(workspace, count):
        length = len(features.input_ids)
        for name, rows in features.arrays().items():
            started = time.process_time()
            if name not in maps:
                path = workspace / "memmap" / f"{name}.npy"
                maps[name] = np.lib.format.open_memmap(path, "w+", rows.dtype, (total, *rows.shape[1:]))
            maps[name][at : at + length] = rows
            cpu += time.process_time() - started
            raw += rows.nbytes
        at += length
    started = time.process_time()
    for each in maps.values():
        each.flush()
    cpu += time.process_time() - started
    return {"cpu_s_per_gb": cpu / raw * 1e9}


def write_safetensors(workspace: Path, count: int) -> None:
    """Write one file a sequence."""
    import torch
    from safetensors.torch import save_file

    (workspace / "safetensors").mkdir()
    for number, features in enumerate(sequences(workspace, count)):
        tensors = {name: torch.from_numpy(np.ascontiguousarray(rows)) for name, rows in features.arrays().items()}
        save_file(tensors, workspace / "safetensors" / f"{number}.safetensors")


NAMES = ("input_ids", "loss_mask", "lse", "argmax", "last_hidden", "aux_hidden")
"""What training reads; the top-K of a store with last hidden states is not."""


def order(count: int) -> list[list[int]]:
    """Return batches of sequences at random."""
    numbers = np.random.default_rng(1).permutation(count).tolist()
    return [numbers[at : at + BATCH] for at in range(0, count, BATCH)]


def second(epoch: Callable[[], None]) -> float:
    """Go through all data twice; return the seconds of the second time."""
    epoch()
    started = time.perf_counter()
    epoch()
    return time.perf_counter() - started


def read_store(workspace: Path, count: int, codec: str) -> float:
    """Read a store in random order; return seconds."""
    from specx.storage.reader import FeatureReader
    from specx.storage.store import FeatureStore
    from specx.train.data.corpus import Corpus
    from specx.train.data.packing import BatchPlan
    from specx.train.data.pinned_buffers import Buffers
    from specx.train.data.prefetch import BatchLoader

    store = FeatureStore.open(workspace / codec)
    corpus = Corpus([FeatureReader(store)], store.info.boundaries)
    plans = [BatchPlan(tuple(batch)) for batch in order(count)]
    loader = BatchLoader(corpus, plans, corpus.length.tolist(), buffers=Buffers())

    def epoch() -> None:
        for batch in loader:
            assert batch.aux_hidden.shape[-1] == H

    return second(epoch)


def read_memmap(workspace: Path, count: int) -> float:
    """Read the memory maps into batches of the same kind; return seconds."""
    lengths = [wide_length(number) for number in range(count)]
    starts = np.cumsum([0, *lengths])
    maps = {name: np.load(workspace / "memmap" / f"{name}.npy", mmap_mode="r") for name in NAMES}
    out = {name: np.empty((BATCH, max(lengths), *rows.shape[1:]), rows.dtype) for name, rows in maps.items()}

    def epoch() -> None:
        for batch in order(count):
            longest = max(lengths[sequence] for sequence in batch)
            for row, sequence in enumerate(batch):
                for name, rows in maps.items():
                    out[name][row, : lengths[sequence]] = rows[starts[sequence] : starts[sequence + 1]]
                    out[name][row, lengths[sequence] : longest] = 0

    return second(epoch)


class SafetensorsDataset:
    """One file a sequence, as a map-style data set."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Any]:
        from safetensors import safe_open

        with safe_open(self._folder / f"{number}.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in NAMES}


def packed(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad the sequences of a batch to its longest."""
    from torch.nn.utils.rnn import pad_sequence

    return {name: pad_sequence([item[name] for item in items], batch_first=True) for name in NAMES}


def read_safetensors(workspace: Path, count: int) -> float:
    """Read the files by a DataLoader of two processes; return seconds."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        SafetensorsDataset(workspace / "safetensors", count),  # type: ignore[arg-type]
        batch_sampler=order(count),
        num_workers=2,
        collate_fn=packed,
        persistent_workers=True,
    )

    def epoch() -> None:
        for batch in loader:
            assert batch["aux_hidden"].shape[-1] == H

    return second(epoch)


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Run one measurement so that no other has left anything behind."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    count = arguments.sequences
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        in_own_process(make_pool, workspace)
        written = {codec: in_own_process(write_store, workspace, count, codec) for codec in CODECS}
        memmap = in_own_process(write_memmap, workspace, count)
        in_own_process(write_safetensors, workspace, count)
        lengths = [wide_length(number) for number in range(count)]
        readers: dict[str, tuple[Any, ...]] = {
            "memmap": (read_memmap, workspace, count),
            "none": (read_store, workspace, count, "none"),
            "safetensors": (read_safetensors, workspace, count),
            **{codec: (read_store, workspace, count, codec) for codec in ("lossless", "zstd", "int8")},
        }
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(arguments.rounds):
            for name, call in readers.items():
                seconds[name].append(in_own_process(*call))
    rate = {name: sum(lengths) / statistics.median(each) for name, each in seconds.items()}
    over_safetensors = [a / b for a, b in zip(seconds["safetensors"], seconds["lossless"], strict=True)]
    over_zstd = [a / b for a, b in zip(seconds["zstd"], seconds["lossless"], strict=True)]
    over_memmap = [a / b for a, b in zip(seconds["memmap"], seconds["none"], strict=True)]
    result = {
        **{f"{codec}_over_raw": round(each["over_raw"], 4) for codec, each in written.items()},
        "int8_rel_error": round(written["int8"]["error"], 5),
        "fp8_rel_error": round(written["fp8"]["error"], 5),
        **{f"write_{codec}_cpu_s_per_gb": round(each["cpu_s_per_gb"], 3) for codec, each in written.items()},
        "write_memmap_cpu_s_per_gb": round(memmap["cpu_s_per_gb"], 3),
        "write_cpu_over_memmap": round(written["lossless"]["cpu_s_per_gb"] / memmap["cpu_s_per_gb"], 2),
        "writer_peak_mb": round(max(each["peak_mb"] for each in written.values())),
        **{f"read_{name}_tokens_per_s": round(each) for name, each in rate.items()},
        "read_none_over_memmap": round(statistics.median(over_memmap), 3),
        "read_none_over_memmap_spread": [round(min(over_memmap), 3), round(max(over_memmap), 3)],
        "read_lossless_over_safetensors": round(statistics.median(over_safetensors), 3),
        "read_lossless_over_safetensors_spread": [round(min(over_safetensors), 3), round(max(over_safetensors), 3)],
        "read_lossless_over_zstd": round(statistics.median(over_zstd), 3),
        "read_lossless_over_zstd_spread": [round(min(over_zstd), 3), round(max(over_zstd), 3)],
        "sequences": count,
        "tokens": sum(lengths),
        "rounds": arguments.rounds,
    }
    if not arguments.json:
        for key, value in result.items():
            print(f"{key:40} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
