"""What is in a store, for ``specx store info``."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from ..catalog.rejects import count_rejects
from ..catalog.sequence_id import find
from ..catalog.views import load_views, view_names
from ..parts.array_metadata import METADATA_FILE
from ..store import FeatureStore
from .config import InfoConfig


def run(config: InfoConfig) -> dict[str, Any]:
    """Return what is in a store, ready for JSON."""
    return summary(FeatureStore.open(config.store))


def summary(store: FeatureStore) -> dict[str, Any]:
    """Return counts, lengths in tokens and bytes by array, ready for JSON."""
    sequences = store.catalogue()
    bytes_by_array: Counter[str] = Counter()
    for record in store.records.values():
        for stored in record.objects:
            name = stored.key.partition("/")[0]
            bytes_by_array["metadata" if name == METADATA_FILE else name] += stored.size
    tokens = int(sequences.length.sum())
    total = sum(bytes_by_array.values())
    quantiles = np.quantile(sequences.length, (0, 0.5, 0.95, 1)) if len(sequences) else np.zeros(4)
    return {
        "store": store.root,
        "format": store.info.format,
        "target": store.info.target.model_dump(),
        "compute_dtype": store.info.compute_dtype,
        "boundaries": list(store.info.boundaries),
        "hidden_size": store.info.hidden_size,
        "vocab_size": store.info.vocab_size,
        "top_k": store.info.top_k,
        "codec": store.info.codec,
        "quantization_error": _quantization_error(store),
        "last_hidden": store.info.last_hidden,
        "parts": len(store.records),
        "sequences": len(sequences),
        "tokens": tokens,
        "rejected": count_rejects(store.place),
        "views": _views(store),
        "categories": dict(Counter(map(str, sequences.category)).most_common()),
        "sources": dict(Counter(map(str, sequences.source)).most_common()),
        "lengths": dict(zip(("min", "median", "p95", "max"), map(int, quantiles), strict=True)),
        "bytes": total,
        "bytes_per_token": round(total / tokens, 1) if tokens else 0.0,
        "bytes_by_array": dict(bytes_by_array.most_common()),
    }


def _quantization_error(store: FeatureStore) -> dict[str, float]:
    """Return the relative L2 error of each quantised array, over all parts by their tokens."""
    squared: defaultdict[str, float] = defaultdict(float)
    tokens: Counter[str] = Counter()
    for record in store.records.values():
        for name, error in record.quantization_error.items():
            squared[name] += sum(record.sequences.lengths) * error**2
            tokens[name] += sum(record.sequences.lengths)
    return {name: round((squared[name] / tokens[name]) ** 0.5, 5) for name in sorted(tokens)}


def _views(store: FeatureStore) -> dict[str, dict[str, int]]:
    """Return sequences and tokens of each view, and how many of its sequences are not in the store."""
    sequences = store.catalogue()
    found: dict[str, dict[str, int]] = {}
    for name in view_names(store.place):
        rows = find(load_views(store.place, [name]).ids, sequences.ids)
        there = rows[rows >= 0]
        found[name] = {
            "sequences": len(there),
            "tokens": int(sequences.length[there].sum()),
            "missing": len(rows) - len(there),
        }
    return found
