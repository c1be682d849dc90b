"""Stored features for other programs: a torch dataset of sequences, and packed batches as training has them.

Shapes: T tokens of a sequence, L boundaries, H hidden size, K logits kept per token.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..storage.catalog.views import load_views
from ..storage.reader import FeatureReader, Read
from ..storage.schema import array_specs
from ..storage.store import FeatureStore
from .data.batch import Batch
from .data.corpus import Corpus
from .data.packing import BatchPlan, grouped, seeds_of_step, shuffled
from .data.pinned_buffers import Buffers
from .data.prefetch import BatchLoader
from .errors import TrainError

_TYPES = {
    "aux_hidden": torch.bfloat16,
    "last_hidden": torch.bfloat16,
    "topk_ids": torch.int64,
    "topk_logprob": torch.float16,
    "lse": torch.float32,
    "argmax": torch.int64,
    "input_ids": torch.int64,
    "loss_mask": torch.bool,
}


class FeatureDataset(Dataset[dict[str, torch.Tensor]]):
    """The sequences of a store as a map-style torch dataset.

    An item is a dict of tensors, those of ``arrays``:

    input_ids     (T,)       int64
    loss_mask     (T,)       bool      True on the target's own tokens; the view's mask where it has one
    aux_hidden    (T, L, H)  bfloat16  boundaries ascending
    last_hidden   (T, H)     bfloat16  after the target's final norm
    argmax        (T,)       int64     the target's own next token
    lse           (T,)       float32   log-sum-exp of the target's logits over its full vocabulary
    topk_ids      (T, K)     int64     by falling logit
    topk_logprob  (T, K)     float16   over the target's full vocabulary

    Sequences differ in length: use a ``DataLoader`` with ``batch_size=None``, or a ``collate_fn``. Workers may be
    forked or spawned; each opens the store anew. Spawn them for a store on S3, whose client does not survive a fork.
    """

    def __init__(
        self,
        store: FeatureStore | str | Path,
        view: str | Sequence[str] | None = None,
        *,
        arrays: Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> None:
        """Open a store or a view of it; sequences committed later are not seen.

        ``arrays`` are the names to read, by default all that the store has; longer sequences are cut to
        ``max_length`` tokens. Raises StoreError for a store or a view that is not there, TrainError for an array.
        """
        self._path = store.root if isinstance(store, FeatureStore) else str(store)
        self._views = (view,) if isinstance(view, str) else tuple(view or ())
        self._reader = self._open(store if isinstance(store, FeatureStore) else FeatureStore.open(store))
        self._process = os.getpid()
        self._units = tuple(self._reader.store.records)
        self.info = self._reader.store.info
        """Target, boundaries and codec of the store."""
        known = list(array_specs(self.info))
        self.arrays = tuple(known if arrays is None else arrays)
        """Names of the tensors of an item."""
        if missing := [name for name in self.arrays if name not in known]:
            raise TrainError(f"{self._path}: has no array {missing[0]}, expected some of {', '.join(known)}.")
        catalogue = self._reader.catalogue
        limit = max_length or int(catalogue.length.max(initial=0))
        self.lengths: list[int] = np.minimum(catalogue.length, limit).tolist()
        """Tokens of each item."""
        self.ids: list[str] = [bytes(each).hex() for each in catalogue.ids]
        """Sequence ids, as hexadecimal: a hash of the token ids."""
        self.categories: list[str] = [str(each) for each in catalogue.category]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a sequence. Raises IndexError, and StoreCorruptError where a byte was changed."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._path}: sequence {index} of {len(self)}")
        sequence = index % len(self)
        reader, specs, T = self._reader_here(), array_specs(self.info), self.lengths[sequence]
        found = {name: np.empty((T, *specs[name].inner_shape), specs[name].dtype) for name in self.arrays}
        wanted = []
        for name, out in found.items():
            if name == "aux_hidden":
                wanted += [Read(sequence, name, out[:, column], column) for column in range(out.shape[1])]
            else:
                wanted.append(Read(sequence, name, out))
        reader.read_all(wanted)
        return {name: _tensor(name, out) for name, out in found.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open store out: it is opened again where it is needed."""
        return self.__dict__ | {"_reader": None, "_process": None}

    def _open(self, store: FeatureStore, units: Sequence[int] | None = None) -> FeatureReader:
        view = load_views(store.place, self._views) if self._views else None
        return FeatureReader(store, units, view)

    def _reader_here(self) -> FeatureReader:
        """Return the reader of this process: threads and clients of another one are not inherited."""
        if self._process != os.getpid():
            self._reader = self._open(FeatureStore.open(self._path), self._units)
            self._process = os.getpid()
        return self._reader


def packed_batches(
    store: FeatureStore | str | Path,
    *,
    batch_tokens: int = 16_384,
    seed: int = 0,
    epoch: int = 0,
    view: str | Sequence[str] | None = None,
    boundaries: Sequence[int] | None = None,
    max_length: int | None = None,
) -> Iterator[Batch]:
    """Yield every sequence of a store once, in random order, packed into batches as training has them.

    A batch is one row of whole sequences, ``batch_tokens`` tokens at most, or one longer sequence; ``Batch`` has
    shapes and dtypes. The order depends on ``seed`` and ``epoch`` alone. ``boundaries`` are those to read, by default
    all. Batches are read ahead by a thread. Raises StoreError for a store or view that is not there, TrainError for a
    boundary.
    """
    opened = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    names = (view,) if isinstance(view, str) else tuple(view or ())
    reader = FeatureReader(opened, view=load_views(opened.place, names) if names else None)
    corpus = Corpus([reader], tuple(boundaries or opened.info.boundaries))
    lengths = corpus.length if max_length is None else np.minimum(corpus.length, max_length)
    plans = _plans(corpus, lengths, batch_tokens, seed, epoch)
    yield from BatchLoader(corpus, plans, lengths.tolist(), buffers=Buffers())


def _plans(corpus: Corpus, lengths: Any, batch_tokens: int, seed: int, epoch: int) -> list[BatchPlan]:
    order = shuffled(corpus.unit, None, seed, epoch)
    groups = grouped(lengths, batch_tokens, order)
    return [BatchPlan(group, tuple(seeds_of_step(seed, step, len(group)))) for step, group in enumerate(groups, 1)]


def _tensor(name: str, values: Any) -> torch.Tensor:
    dtype = _TYPES[name]
    if dtype == torch.bfloat16:
        return torch.from_numpy(values).view(torch.bfloat16)
    # torch has no operations on uint32, in which token ids are stored.
    plain = values.view(np.int32) if values.dtype == np.uint32 else values
    return torch.from_numpy(plain).to(dtype)
