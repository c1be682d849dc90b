"""Where a value that is not finite comes from: the stored features, or the run itself.

Shapes: T tokens of a sequence, L boundaries, H hidden size.
"""

from collections.abc import Iterator

import numpy as np

from ...storage.reader import Read
from ...storage.schema import Array
from ..data.corpus import Corpus
from ..data.datamodule import FeatureData
from ..data.packing import BatchPlan
from ..errors import NotFiniteError, TrainError
from .run_directory import RunDirectory


def explain(error: NotFiniteError, data: FeatureData, directory: RunDirectory) -> TrainError:
    """Return what to tell of a step that could not be taken; every process comes to the same words."""
    plans = data.holdout_plans if error.is_held_out else data.step_plans(error.step)
    found = find_not_finite(data.corpus, plans)
    if error.is_held_out:
        happened = f"It is held out, and was met behind step {error.step}."
    else:
        kept = f"checkpoint of step {error.step - 1}" if error.step > 1 else "start"
        happened = f"Step {error.step} was not taken, and the run stands at the {kept}."
    if found is not None:
        return TrainError(
            f"{found}. {happened} Extract that part again, or leave the sequence out by a view in another run "
            "(docs/training.md)."
        )
    return TrainError(
        f"{directory.path}: {error}, though all its features are finite: the run diverges. "
        f"{'' if error.is_held_out else happened + ' '}Train again with another --out and a lower --lr."
    )


def find_not_finite(corpus: Corpus, plans: list[BatchPlan]) -> str | None:
    """Return where the first stored value that is not finite lies among the sequences of some batches, if any is."""
    for plan in plans:
        for sequence in plan.sequences:
            for name, shown, rows in _floats(corpus, sequence):
                bad = ~np.isfinite(rows)
                if name == "topk_logprob":
                    bad &= ~np.isneginf(rows)  # a chance of nothing is one
                if bad.any():
                    return _where(corpus, sequence, shown, rows, bad)
    return None


def _floats(corpus: Corpus, sequence: int) -> Iterator[tuple[str, str, Array]]:
    """Yield each array of a sequence that training reads, as float32, with its name and its name for users."""
    info, T = corpus.info, int(corpus.length[sequence])
    H = info.hidden_size
    for column, boundary in enumerate(corpus.boundaries):
        aux_hidden = np.empty((T, H), np.uint16)
        corpus.read_all([Read(sequence, "aux_hidden", aux_hidden, column)])
        yield "aux_hidden", f"aux_hidden of boundary {boundary}", _as_float32(aux_hidden)
    lse = np.empty(T, np.float32)
    corpus.read_all([Read(sequence, "lse", lse)])
    yield "lse", "lse", lse
    if info.last_hidden:
        last_hidden = np.empty((T, H), np.uint16)
        corpus.read_all([Read(sequence, "last_hidden", last_hidden)])
        yield "last_hidden", "last_hidden", _as_float32(last_hidden)
    else:
        logprob = np.empty((T, info.top_k), np.float16)
        corpus.read_all([Read(sequence, "topk_logprob", logprob)])
        yield "topk_logprob", "topk_logprob", logprob.astype(np.float32)


def _as_float32(bits: Array) -> Array:
    """Return the values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _where(corpus: Corpus, sequence: int, shown: str, rows: Array, bad: Array) -> str:
    reader, number = corpus.locate(sequence)
    store, catalogue = reader.store, reader.catalogue
    token = int(np.flatnonzero(bad.reshape(len(bad), -1).any(1))[0])
    value = float(rows.reshape(len(rows), -1)[token][bad.reshape(len(bad), -1)[token]][0])
    part = store.part_path(store.records[int(catalogue.unit[number])])
    return f"{part}: {shown} is {value} at token {token} of sequence {bytes(catalogue.ids[number]).hex()}"
