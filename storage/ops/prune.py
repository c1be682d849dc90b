"""``store prune``: a smaller store of the same sequences.

Boundaries are left out, the last hidden states too, or another codec is used;
nothing is run through the target. Interrupted, the same command goes on.
"""

import dataclasses
from dataclasses import dataclass

from ..codec_names import CodecName
from ..errors import StoreError
from ..reader import FeatureReader
from ..schema import DatasetInfo, SequenceFeatures
from ..store import FeatureStore
from ..writer import FeatureWriter
from .config import PruneConfig
from .merge import copy_beside, copy_target, origins

_LOSSY: tuple[CodecName, ...] = ("int8", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What a prune wrote."""

    sequences: int
    tokens: int


def run(config: PruneConfig) -> Pruned:
    """Write the smaller store, or what an earlier run left to do."""
    store = FeatureStore.open(config.store)
    info = pruned_info(store.info, boundaries=config.boundaries, codec=config.codec, last_hidden=config.last_hidden)
    return prune(store, FeatureStore.create(config.into, info), tokens_per_part=config.tokens_per_part)


def pruned_info(
    info: DatasetInfo, *, boundaries: tuple[int, ...] | None, codec: CodecName | None, last_hidden: bool | None
) -> DatasetInfo:
    """Return what the smaller store will say of itself; raise StoreError for what the larger one cannot give."""
    kept = info.boundaries if boundaries is None else boundaries
    if absent := sorted(set(kept) - set(info.boundaries)):
        raise StoreError(f"boundaries {absent} are not in the store, which has {list(info.boundaries)}.")
    if last_hidden and not info.last_hidden:
        raise StoreError("the store has no last hidden states to keep. Leave --last-hidden out.")
    keeps_last_hidden = info.last_hidden if last_hidden is None else last_hidden
    if codec is not None and info.codec in _LOSSY and codec != info.codec:
        raise StoreError(f"the store was quantised by {info.codec}; another codec cannot bring back what that lost.")
    return info.model_copy(update={"boundaries": kept, "codec": codec or info.codec, "last_hidden": keeps_last_hidden})


def prune(store: FeatureStore, into: FeatureStore, *, tokens_per_part: int) -> Pruned:
    """Write every sequence that ``into`` lacks, in its boundaries and codec, with target, views and rejects."""
    copy_target(store, into)
    with FeatureWriter(into, tokens_per_part=tokens_per_part) as writer:
        for unit in sorted(store.records):
            record = store.records[unit]
            reader = FeatureReader(store, [unit])
            for number, origin in enumerate(origins(record)):
                if bytes.fromhex(record.sequences.ids[number]) not in writer:
                    writer.add(_fewer(reader.features(number), store.info, into.info), origin)
    copy_beside(store, into)
    into.records.save_index()
    return Pruned(sequences=writer.committed_sequences, tokens=writer.committed_tokens)


def _fewer(features: SequenceFeatures, info: DatasetInfo, wanted: DatasetInfo) -> SequenceFeatures:
    columns = [info.boundaries.index(boundary) for boundary in wanted.boundaries]
    return dataclasses.replace(
        features,
        aux_hidden=features.aux_hidden[:, columns],
        last_hidden=features.last_hidden if wanted.last_hidden else None,
    )
