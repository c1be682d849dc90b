"""What a run will take of disk and time, before it has cost any.

Only the target's config is read and, for conversations, its tokenizer. A run is refused only where the disk
of its store has less room than it will need.
"""

import logging
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import SpecxError
from ..hub import TargetError
from ..storage.ops.size_estimate import Parts, StoreEstimate, cut, estimate_size, spread
from ..storage.schema import DatasetInfo, TargetIdentity
from .config import ExtractConfig, PlanConfig
from .data.row_count import Count, count
from .target import Target, open_target, resolve_boundaries

_ROWS_OF_A_PLAN = 1000
_ROWS_OF_A_RUN = 200
"""So many of a source are looked at: a run must not wait for its own estimate."""
_WHOLE_BYTES_OF_A_RUN = 256 << 20
"""Files up to this size are counted whole, which takes some seconds. First rows may be shorter than others."""

_SEQUENCE_TOKENS = 1500
"""Length that is assumed where only tokens are given."""

_log = logging.getLogger(__name__)


class PlanError(SpecxError):
    """There is nothing to plan with, or no room for what is planned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEstimate:
    """What a run will write."""

    store: StoreEstimate
    target_bytes: int
    """Of the target's embedding and head, which the store holds once."""
    basis: str
    """What it rests on, in words."""

    @property
    def bytes(self) -> int:
        """All that goes to disk."""
        return self.store.bytes + self.store.commit_bytes + self.target_bytes

    def __str__(self) -> str:
        sequences, tokens = f"{self.store.sequences:,} sequences", f"{_short(self.store.tokens)} tokens"
        return f"about {sequences}, {tokens}, {_short(self.bytes, 'B')} in {self.store.parts:,} parts"


def plan(config: PlanConfig) -> dict[str, Any]:
    """Return what a run would write, ready for JSON; raise SpecxError where that cannot be told."""
    target = open_target(config.target, weights=False)
    if (config.tokens is None) == (not config.data):
        raise PlanError("nothing to plan, or two things: give either --tokens or --data.")
    if config.tokens is not None:
        expected = _of_tokens(config, target, config.tokens)
    elif config.sequences is not None:
        raise PlanError("--sequences goes with --tokens: those of --data are counted.")
    else:
        counted = count(config, target, sample_rows=_ROWS_OF_A_PLAN, whole_bytes=sys.maxsize)
        if counted is None:
            raise PlanError(f"{', '.join(config.data)}: the number of rows is unknown. Give --limit, or --tokens.")
        expected = _of_count(config, target, counted)
    store = expected.store
    free_bytes = free_space(config.store) if config.store else None
    seconds = store.tokens / config.tokens_per_s if config.tokens_per_s else None
    return {
        "target": str(target.path),
        "basis": expected.basis,
        "sequences": store.sequences,
        "tokens": store.tokens,
        "parts": store.parts,
        "files": store.files,
        "bytes": store.bytes,
        "raw_bytes": store.raw_bytes,
        "bytes_per_token": round(store.bytes / store.tokens, 1) if store.tokens else 0.0,
        "bytes_by_array": store.bytes_by_array,
        "raw_bytes_by_array": store.raw_bytes_by_array,
        "commit_bytes": store.commit_bytes,
        "target_bytes": expected.target_bytes,
        **({"hours": round(seconds / 3600, 2)} if seconds is not None else {}),
        **({"free_bytes": free_bytes} if free_bytes is not None else {}),
    }


def expect(config: ExtractConfig, target: Target) -> RunEstimate | None:
    """Return what a run will write if its store is empty, or None, said in the log, if nobody knows.

    Reads the first rows of a few files. For data that cannot be read it is None too: the run will say so itself.
    """
    try:
        counted = count(config, target, sample_rows=_ROWS_OF_A_RUN, whole_bytes=_WHOLE_BYTES_OF_A_RUN)
    except SpecxError as error:
        _log.debug("plan: none, as the data cannot be looked at: %s", error)
        return None
    if counted is None:
        _log.info("plan: none, as the number of rows is unknown")
        return None
    return _of_count(config, target, counted)


def require_room(
    store: str, expected: RunEstimate, *, force: bool, stored_bytes: int = 0, free_bytes: int | None = None
) -> None:
    """Log what a run will write and the room there is; raise PlanError if it does not fit and is not forced.

    ``stored_bytes`` of it are in the store already. ``free_bytes`` is by default what the disk of the store
    says; in object storage there is always room.
    """
    if free_bytes is None:
        free_bytes = free_space(store)
    if free_bytes is None:
        _log.info("plan: %s", expected)
        return
    _log.info("plan: %s; %s free", expected, _short(free_bytes, "B"))
    missing_bytes = expected.bytes - stored_bytes
    if missing_bytes > free_bytes and not force:
        raise PlanError(
            f"{store}: about {_short(missing_bytes, 'B')} will be written ({expected.basis}) and "
            f"{_short(free_bytes, 'B')} are free. Free some space, use another --store or --codec, or pass --force."
        )


def free_space(store: str) -> int | None:
    """Return the bytes free on the disk where a store is or would be made, None for object storage."""
    if "://" in store:
        return None
    path = Path(store).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _of_tokens(config: PlanConfig, target: Target, tokens: int) -> RunEstimate:
    length = min(_SEQUENCE_TOKENS, config.max_length or target.max_length, target.max_length)
    sequences = min(config.sequences or math.ceil(tokens / length), tokens)
    basis = "tokens and sequences given" if config.sequences else f"tokens given, sequences of {length} assumed"
    # Half of the last sequence, if all have the same length.
    parts = spread(tokens, sequences, config.tokens_per_part, excess=tokens / sequences / 2, writers=config.workers)
    return _estimated(config, target, parts, basis)


def _of_count(config: ExtractConfig, target: Target, counted: Count) -> RunEstimate:
    if counted.is_exact and config.workers == 1:
        return _estimated(config, target, cut(counted.lengths, config.tokens_per_part), counted.basis)
    lengths = counted.lengths.astype(float)
    # A long sequence is more likely than a short one to be the last of a part.
    excess = float((lengths**2).sum() / lengths.sum() / 2) if len(lengths) else 0.0
    parts = spread(counted.tokens, counted.sequences, config.tokens_per_part, excess=excess, writers=config.workers)
    return _estimated(config, target, parts, counted.basis)


def _estimated(config: ExtractConfig, target: Target, parts: Parts, basis: str) -> RunEstimate:
    if config.top_k > target.vocab_size:
        raise TargetError(f"{target.path}: top_k {config.top_k} is larger than the vocabulary, {target.vocab_size}.")
    info = DatasetInfo(
        # Nobody reads this one: it is the weights that take long to hash.
        target=TargetIdentity(architecture=target.architecture, config_hash="", weights_hash=""),
        compute_dtype=target.dtype,
        boundaries=resolve_boundaries(target, config.boundaries),
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        top_k=config.top_k,
        codec=config.codec,
        last_hidden=config.last_hidden,
    )
    value_bytes = 4 if target.dtype == "float32" else 2
    # Embedding, head and final norm.
    target_bytes = (2 * target.vocab_size + 1) * target.hidden_size * value_bytes
    return RunEstimate(store=estimate_size(info, parts), target_bytes=target_bytes, basis=basis)


def _short(value: int, unit: str = "") -> str:
    """Return a number with two or three digits, such as 137k or, with a unit, 40.2 GB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            scaled = value / factor
            return f"{scaled:.{0 if scaled >= 100 else 1}f}{' ' if unit else ''}{prefix}{unit}"
    return f"{value} {unit}".rstrip()
