"""What a draft would be accepted, from stored features alone: no target, no engine.

The engine asks the draft only where its own accepted runs end, so a mean over all anchors is not what it finds. The
walk goes as the engine goes: it starts at the first generated token, and behind each verification jumps by what was
accepted and one. The draft is fed the stored text where the engine feeds its own proposals; up to the first miss they
are the same, and behind it nothing counts.

Shapes: B rows, T tokens, N = B * T, K drafted tokens, V target vocabulary, Vd draft vocabulary.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ...storage.reader import FeatureReader
from ...storage.store import FeatureStore
from ..data.batch import PADDING, Batch, read_batch
from ..data.corpus import Corpus
from ..data.packing import BatchPlan, Group, grouped
from ..data.target_head import read_head
from ..errors import TrainError
from ..families.base import StepContext
from ..families.load import load_draft
from ..loss.anchors import supervised_anchors
from ..loss.metrics import StepResults
from ..loss.target_distribution import Vocabulary
from .config import EvaluateConfig
from .generations import Tally, tally_of
from .prompts import chosen_sequences
from .summary import by_context

_BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateSummary:
    """How a draft would do. The first four are those of decoding in an engine, and mean the same."""

    acceptance_length: float
    """Of greedy decoding, by the walk."""
    per_position: list[float]
    by_category: dict[str, float]
    by_context: dict[str, float]
    text_acceptance_length: float
    """By the walk over hits of the stored text: of sampling as the stored answers were."""
    anchor_acceptance_length: float
    """The mean over all anchors, each counted once: what training reports."""
    anchor_text_acceptance_length: float
    accuracy: list[float]
    """By step: share of the anchors where the draft's best token is the target's best."""
    text_accuracy: list[float]
    """By step: where it is the stored text's."""
    overlap: list[float]
    """By step: mean Σ min(p, q), the chance that a token sampled from the draft is accepted by sampling."""
    sequences: int
    verifications: int
    """Of the walk."""
    seconds: float


@dataclass(kw_only=True, slots=True)
class _Walks:
    """What the walks over sequences found, by one kind of hit."""

    contexts: list[tuple[int, list[int]]] = field(default_factory=list)
    """Of each generation: the context at its first verification, and what each accepted."""
    categories: dict[str, Tally] = field(default_factory=dict)
    total: Tally = field(default_factory=Tally)
    anchors: Tally = field(default_factory=Tally)
    """Every anchor once, whether or not the walk comes there."""

    def add(self, leading: npt.NDArray[np.int64], first: int, category: str) -> None:
        """Walk over the anchors of one generation, whose ``leading`` hits (anchors,) start at position ``first``."""
        accepted: list[int] = []
        at = 0
        while at < len(leading):
            accepted.append(int(leading[at]))
            at += accepted[-1] + 1
        # Before the first verification the engine knows the prompt and one token.
        self.contexts.append((first + 2, accepted))
        tally = tally_of(accepted)
        self.total.add(tally)
        self.categories.setdefault(category, Tally()).add(tally)
        self.anchors.add(tally_of(leading.tolist()))


def estimate(config: EvaluateConfig) -> EstimateSummary:
    """Run the draft over stored sequences as engines do; raise SpecxError."""
    started = time.monotonic()
    assert config.store is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    exported = load_draft(Path(config.draft), torch.float32)
    draft = exported.draft
    store = FeatureStore.open(config.store)
    info = store.info
    for name in ("hidden_size", "vocab_size"):
        if (found := getattr(draft.spec, name)) != (stored := getattr(info, name)):
            raise TrainError(
                f"{config.draft}: its {name} is {found}, that of {config.store} {stored}. "
                "Give a store of the target that the draft is for."
            )
    reader = FeatureReader(store)
    sequences = chosen_sequences(reader, config)
    corpus = Corpus([reader], draft.spec.boundaries)
    head = read_head(store, exported.vocabulary.numpy())
    t2d = torch.zeros(info.vocab_size, dtype=torch.bool)
    t2d[exported.vocabulary] = True
    offsets = exported.vocabulary - torch.arange(len(exported.vocabulary))
    vocabulary = Vocabulary(offsets, t2d, head.lm_head_rows, head.transform).to(device)
    draft = draft.to(device)
    context = StepContext(embed_tokens=head.embed_tokens.to(device), vocabulary=vocabulary, dtype=dtype)

    lengths = corpus.length
    tokens: list[int] = lengths.tolist()
    chosen = np.asarray(sequences, np.int64)
    steps = config.num_speculative_tokens
    greedy, text = _Walks(), _Walks()
    sums = torch.zeros(4, steps)
    for group in grouped(lengths, _BATCH_TOKENS, chosen):
        batch = read_batch(corpus, BatchPlan(group), tokens)
        batch = replace(batch, anchors=supervised_anchors(batch, steps)).to(device)
        with torch.inference_mode():
            results = exported.family.predict(draft, batch, context)
        sums += _walk_batch(batch, results, _categories(reader, group), greedy, text)
    shares = (sums[1:] / sums[0].clamp(min=1)).tolist()
    return EstimateSummary(
        acceptance_length=round(greedy.total.length, 4),
        per_position=_per_position(greedy.total, steps),
        by_category={name: round(tally.length, 4) for name, tally in sorted(greedy.categories.items())},
        by_context=by_context(greedy.contexts),
        text_acceptance_length=round(text.total.length, 4),
        anchor_acceptance_length=round(greedy.anchors.length, 4),
        anchor_text_acceptance_length=round(text.anchors.length, 4),
        accuracy=[round(value, 4) for value in shares[0]],
        text_accuracy=[round(value, 4) for value in shares[1]],
        overlap=[round(value, 4) for value in shares[2]],
        sequences=len(sequences),
        verifications=greedy.total.verifications,
        seconds=round(time.monotonic() - started, 2),
    )


def _categories(reader: FeatureReader, sequences: Group) -> list[str]:
    return [str(reader.catalogue.category[sequence]) for sequence in sequences]


def _walk_batch(
    batch: Batch,
    results: StepResults,
    categories: list[str],
    greedy: _Walks,
    text: _Walks,
) -> torch.Tensor:
    """Add a batch's walks; return for each step (4, K) anchors, greedy hits, text hits and the summed overlap."""
    assert batch.anchors is not None
    anchors, steps = batch.anchors.flatten(1), len(batch.anchors)
    best, ids = batch.argmax.flatten(), batch.input_ids.flatten()
    # The ends wrap around to where no anchor is.
    is_best = torch.stack([anchors[k] & (results.proposed[k] == best.roll(-k - 1)) for k in range(steps)])
    is_text = torch.stack([anchors[k] & (results.proposed[k] == ids.roll(-k - 2)) for k in range(steps)])
    leading = [hits.long().cumprod(0).sum(0).view_as(batch.input_ids).cpu().numpy() for hits in (is_best, is_text)]
    for row, first, stop, position, document in _generations(batch, anchors[-1].view_as(batch.input_ids)):
        for walks, counts in zip((greedy, text), leading, strict=True):
            walks.add(counts[row, first:stop], position, categories[document])
    return torch.stack((anchors.sum(1), is_best.sum(1), is_text.sum(1), results.overlap)).float().cpu()


def _generations(batch: Batch, anchors: torch.Tensor) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield row, first and last anchor + 1, the first one's position and the document of each generation of a batch.

    ``anchors`` (B, T) bool are those whose tokens are all known: a verification at the end of a generation, of which
    some are not, is left out whatever it accepts, or short ones would be taken for long.
    """
    is_anchor, documents = anchors.cpu().numpy(), batch.documents.cpu().numpy()
    positions = batch.positions.cpu().numpy()
    assert not is_anchor[documents == PADDING].any()
    for row in range(len(is_anchor)):
        # An unsupervised token ends a generation, and with it K + 1 anchors before it: runs never touch.
        edges = np.flatnonzero(np.diff(np.concatenate(([0], is_anchor[row].astype(np.int8), [0]))))
        for first, stop in edges.reshape(-1, 2).tolist():
            yield row, first, stop, int(positions[row, first]), int(documents[row, first])


def _per_position(tally: Tally, steps: int) -> list[float]:
    counts = [*(tally.per_position or []), *[0] * steps][:steps]
    return [round(count / max(tally.verifications, 1), 4) for count in counts]
