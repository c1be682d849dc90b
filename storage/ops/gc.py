"""``store gc``: remove what no commit names, once it is old enough not to be somebody's work."""

import time
from dataclasses import dataclass, field

from ..backends.durable import TEMPORARY_PREFIX
from ..catalog.commit_log import COMMITS_DIRECTORY
from ..store import PARTS_DIRECTORY, FeatureStore
from .config import GcConfig


@dataclass(kw_only=True, slots=True)
class Garbage:
    """What was found. Names are keys below the store."""

    removed: list[str] = field(default_factory=list)
    """Or to be removed, in a dry run."""
    too_young: list[str] = field(default_factory=list)
    """Perhaps of a writer that is at work."""
    bytes: int = 0
    """Of the parts and directories among what was removed."""


def run(config: GcConfig) -> Garbage:
    """Remove, or list, the garbage of a store."""
    store = FeatureStore.open(config.store)
    return collect(store, older_than_s=3600 * config.older_than, dry_run=config.dry_run)


def collect(store: FeatureStore, *, older_than_s: float, dry_run: bool) -> Garbage:
    """Remove parts and temporary files that no record names and that nobody changed for so long."""
    found = Garbage()
    now = time.time()
    # Listed before the commits are read again: what is committed in between is then named.
    candidates = _candidates(store)
    store.refresh()
    named = {store.part_key(record) for record in store.records.values()}
    for key in candidates:
        if key in named:
            continue
        sizes = store.place.sizes(key)
        if now - store.place.last_change(key) < older_than_s:
            found.too_young.append(key)
            continue
        found.bytes += sum(sizes.values())
        found.removed.append(key)
        if not dry_run:
            store.place.remove_tree(key)
    return found


def _candidates(store: FeatureStore) -> list[str]:
    """Return every part, and every temporary file or directory of a writer."""
    found = [f"{PARTS_DIRECTORY}/{name}" for name in store.place.names(PARTS_DIRECTORY)]
    for folder in ("", f"{COMMITS_DIRECTORY}/"):
        names = store.place.names(folder.rstrip("/"))
        found += [f"{folder}{name}" for name in names if name.startswith(TEMPORARY_PREFIX)]
    return found
