"""Which of the target's tokens the draft can propose.

Shapes: V target vocabulary, Vd draft vocabulary.
"""

import numpy as np
import numpy.typing as npt

from .corpus import Corpus


def token_counts(corpus: Corpus, store: int, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count the supervised tokens of those of some sequences that are in one of the stores; (V,) int64."""
    counts = np.zeros(corpus.info.vocab_size, np.int64)
    for input_ids in corpus.supervised_tokens(store, sequences[corpus.store[sequences] == store]):
        counts += np.bincount(input_ids, minlength=len(counts))
    return counts


def draft_vocabulary(counts: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.int64]:
    """Return the ``size`` most frequent token ids, ascending; (Vd,) int64. Lower ids win ties."""
    by_frequency = np.argsort(-counts, kind="stable")
    return np.sort(by_frequency[:size]).astype(np.int64)


def offsets(vocabulary: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return ``d2t`` (Vd,) int64: target id = draft id + offset."""
    return vocabulary - np.arange(len(vocabulary))


def membership(vocabulary: npt.NDArray[np.int64], vocab_size: int) -> npt.NDArray[np.bool_]:
    """Return ``t2d`` (V,) bool: whether the draft knows a token."""
    known = np.zeros(vocab_size, np.bool_)
    known[vocabulary] = True
    return known
