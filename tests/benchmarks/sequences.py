"""The sequences that stores are measured with, as plain numpy arrays: the same for us and for whom we are compared to.

wide   200 to 2048 tokens at hidden size 2880, three boundaries and the last hidden state, top-128; the values are real:
       states of the trained tiny target, those of 23 tokens side by side to the full width
small  512 tokens at hidden size 256, made up: of real ones only the sizes matter; the second half is supervised

Nothing of specx is imported but to make the pool that the wide ones are cut from.
"""

from pathlib import Path
from typing import Any

import numpy as np

H, L, K, V = 2880, 3, 128, 2048
DATA = Path(__file__).parents[1] / "data"
LENGTHS = (200, 2048)
POOL_TOKENS = 20_000

SMALL_H, SMALL_V, SMALL_DRAFT_V, SMALL_LENGTH, SMALL_K = 256, 8192, 2048, 512, 8


def make_pool(workspace: Path) -> None:
    """Write the features of some real sequences, a file an array."""
    from specx.extract.config import ExtractConfig
    from specx.extract.pipeline import run
    from specx.storage.reader import FeatureReader
    from specx.storage.store import FeatureStore

    store = workspace / "real"
    run(
        ExtractConfig(
            target=str(DATA / "tiny-gpt-oss"),
            data=(str(DATA / "regen" / "train.parquet"),),
            store=str(store),
            limit=120,
            dtype="bfloat16",
            engine="transformers",
        )
    )
    reader = FeatureReader(FeatureStore.open(store))
    arrays: dict[str, list[Any]] = {}
    for sequence in range(len(reader.catalogue)):
        for name, rows in reader.features(sequence).arrays().items():
            arrays.setdefault(name, []).append(rows)
    (workspace / "pool").mkdir()
    for name, parts in arrays.items():
        np.save(workspace / "pool" / f"{name}.npy", np.concatenate(parts)[:POOL_TOKENS])


def load_pool(workspace: Path) -> dict[str, Any]:
    return {path.stem: np.load(path) for path in sorted((workspace / "pool").iterdir())}


def wide_length(number: int) -> int:
    return int(np.random.default_rng(number).integers(LENGTHS[0], LENGTHS[1] + 1))


def wide_sequence(pool: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the arrays of a sequence, named as in a store and the same each time; hidden states are bfloat16 bits."""
    tokens, width = len(pool["lse"]), pool["last_hidden"].shape[-1]
    random = np.random.default_rng(number)
    length = int(random.integers(LENGTHS[0], LENGTHS[1] + 1))
    # Evenly apart, so that no codec finds the same token twice in what it sees at once.
    segments = -(-H // width)
    start = int(random.integers(tokens))
    rows = [(start + tokens * k // segments + np.arange(length)) % tokens for k in range(segments)]
    arrays = {name: pool[name][rows[0]] for name in pool if "hidden" not in name}
    # Ids alone decide what a sequence is: these differ.
    arrays["input_ids"] = random.integers(0, V, length).astype(np.int32)
    for name in ("aux_hidden", "last_hidden"):
        arrays[name] = np.concatenate([pool[name][each] for each in rows], axis=-1)[..., :H]
    return arrays


def small_sequence(number: int) -> dict[str, Any]:
    """Return the arrays of a made-up sequence, the same each time."""
    random = np.random.default_rng(number)

    def bits(*shape: int) -> Any:
        return (random.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)

    return {
        "input_ids": random.integers(0, SMALL_V, SMALL_LENGTH, np.int32),
        "loss_mask": (np.arange(SMALL_LENGTH) >= SMALL_LENGTH // 2).astype(np.uint8),
        "aux_hidden": bits(SMALL_LENGTH, L, SMALL_H),
        "last_hidden": bits(SMALL_LENGTH, SMALL_H),
        "topk_ids": random.integers(0, SMALL_V, (SMALL_LENGTH, SMALL_K), np.uint32),
        "topk_logprob": random.standard_normal((SMALL_LENGTH, SMALL_K)).astype(np.float16),
        "lse": np.full(SMALL_LENGTH, 9.5, np.float32),
        "argmax": random.integers(0, SMALL_DRAFT_V, SMALL_LENGTH, np.int32),
    }
