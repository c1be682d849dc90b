"""``store select``: a view of what a filter leaves of a store."""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..catalog.sequence_table import Catalogue
from ..catalog.views import View, ViewWriter, load_views, view_names
from ..errors import StoreError
from ..reader import FeatureReader
from ..schema import Origin
from ..store import FeatureStore
from .config import SelectConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """What sequences must be like; None is no condition."""

    categories: tuple[str, ...] | None = None
    min_length: int | None = None
    """Tokens."""
    max_length: int | None = None
    """Tokens; longer sequences are left out, not cut."""
    source: str | None = None
    """Regular expression, found anywhere in the source's name."""
    limit: int | None = None
    """The first so many of the rest, in the order of commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What a new view holds."""

    view: str
    sequences: int
    tokens: int


def run(config: SelectConfig) -> Selection:
    """Make the view that the settings describe."""
    wanted = Filter(
        categories=config.category or None,
        min_length=config.min_length,
        max_length=config.max_length,
        source=config.source,
        limit=config.limit,
    )
    return select(FeatureStore.open(config.store), config.name, wanted, views=config.view)


def select(store: FeatureStore, name: str, wanted: Filter, *, views: tuple[str, ...] = ()) -> Selection:
    """Make a view of the sequences of a store, or of some of its views, that pass a filter.

    Masks, categories and sources are those of the views where there are some. Raises StoreError if the
    view exists or would be empty, or if the filter is no regular expression.
    """
    if name in view_names(store.place):
        raise StoreError(f"{store.root}: there is a view {name} already. Choose another name.")
    view = load_views(store.place, views) if views else None
    reader = FeatureReader(store, view=view)
    rows = _passing(reader.catalogue, wanted)
    if not len(rows):
        raise StoreError(f"{store.root}: no sequence passes the filter. `specx store info` tells what is there.")
    with ViewWriter(store.place, name) as writer:
        _write(writer, reader, rows, view)
    return Selection(view=name, sequences=len(rows), tokens=int(reader.catalogue.length[rows].sum()))


def _write(writer: ViewWriter, reader: FeatureReader, rows: npt.NDArray[np.int64], view: View | None) -> None:
    sequences = reader.catalogue
    for row in rows.tolist():
        origin = Origin(
            source=str(sequences.source[row]), row=int(sequences.row[row]), category=str(sequences.category[row])
        )
        mask = reader.other_mask(row) if view is not None else None
        writer.add(bytes(sequences.ids[row]), mask, origin)


def _passing(sequences: Catalogue, wanted: Filter) -> npt.NDArray[np.int64]:
    passes = np.ones(len(sequences), bool)
    if wanted.categories is not None:
        passes &= np.isin(sequences.category.astype(str), wanted.categories)
    if wanted.min_length is not None:
        passes &= sequences.length >= wanted.min_length
    if wanted.max_length is not None:
        passes &= sequences.length <= wanted.max_length
    if wanted.source is not None:
        try:
            pattern = re.compile(wanted.source)
        except re.error as error:
            raise StoreError(f"--source {wanted.source}: not a regular expression ({error}).") from error
        found = {source: bool(pattern.search(source)) for source in set(sequences.source.tolist())}
        passes &= np.asarray([found[source] for source in sequences.source.tolist()], bool)
    return np.flatnonzero(passes)[: wanted.limit]
