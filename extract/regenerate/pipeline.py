"""``specx regenerate``: have the target answer the prompts of some data, and keep the exact sampled ids."""

import datetime
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ...storage.backends.durable import disk_errors, temporary_name
from ...storage.catalog.rejects import REJECT_SCHEMA
from ...storage.schema import Reject
from ..engines.single import vllm_options
from ..progress import Progressed, Reporter, reporter
from ..target import Target, open_target
from .answer_file import AnswerFile, AnswerSettings, read_settings
from .answer_paths import pieces_directory, rejects_file
from .config import RegenerateConfig
from .generation_config import answer_settings, stop_ids
from .prompts import PromptReader, RegenerationPrompt
from .sampler import Answer, Sampling, VllmSampler

_log = logging.getLogger(__name__)

_REJECTS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class RegenerateSummary:
    """What one run did. ``answers + reused + rejected`` is the number of rows read."""

    answers: int
    """Made by this run."""
    tokens: int
    """Sampled, of these."""
    reused: int
    """Rows that were answered before."""
    rejected: int
    """Rows without a prompt that can be served."""
    truncated: int
    """Answers of this run that were cut off at the length allowed."""
    tokens_per_s: float
    seconds: float


@dataclass(kw_only=True, slots=True)
class _Counts:
    answers: int = 0
    tokens: int = 0
    reused: int = 0
    rejected: int = 0
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class _Ledger:
    """Where a run's results are noted: for its summary, for the user to look up, on the terminal."""

    counts: _Counts
    rejects: "_RejectFile"
    shown: Reporter

    def reject(self, reject: Reject) -> None:
        self.counts.rejected += 1
        self.rejects.add(reject)
        self._show()

    def reuse(self) -> None:
        self.counts.reused += 1
        self._show()

    def add(self, answer: Answer) -> None:
        self.counts.answers += 1
        self.counts.tokens += len(answer.sampled)
        self.counts.truncated += answer.finish_reason == "length"
        self._show()

    def _show(self) -> None:
        counts = self.counts
        rows = counts.answers + counts.reused + counts.rejected
        note = f"{counts.answers:,} answers of {counts.tokens:,} tokens"
        note += f", {counts.reused} reused, {counts.rejected} rejected"
        self.shown.show(Progressed(rows, counts.tokens, note))


def run(config: RegenerateConfig) -> RegenerateSummary:
    """Answer every prompt that the output file has no answer to.

    Whatever ends the run, finished answers stay, and the same command goes on. Raises SpecxError.
    """
    started = time.monotonic()
    target = open_target(config.target)
    out = Path(config.out).absolute()
    begun = read_settings(out)
    # Taken once: all answers of a file are of one day, however long they take.
    date = config.date or (begun.date if begun else datetime.date.today().isoformat())
    prompts = PromptReader(config, target, date)
    settings = answer_settings(config, target, date)
    counts = _Counts()
    try:
        with AnswerFile(out, settings, answers_per_piece=config.answers_per_piece) as answers:
            with reporter(config.limit) as shown, _RejectFile(out) as rejects:
                ledger = _Ledger(counts, rejects, shown)
                missing = _missing(prompts, answers, ledger)
                if (first := next(missing, None)) is not None:
                    # Loaded for the first prompt without an answer: a rerun with nothing left loads no model.
                    sampler = _sampler(config, target, settings)
                    try:
                        for answer in sampler.answers(chain([first], missing)):
                            answers.add(answer, prompts.text(answer.sampled))
                            ledger.add(answer)
                    finally:
                        sampler.close()
            answers.finish()
    except KeyboardInterrupt:
        _log.info("%s: interrupted; finished answers are kept, rerun to go on", out)
        raise
    seconds = time.monotonic() - started
    _log.info("%s: %d answers by this run", out, counts.answers)
    return RegenerateSummary(
        answers=counts.answers,
        tokens=counts.tokens,
        reused=counts.reused,
        rejected=counts.rejected,
        truncated=counts.truncated,
        tokens_per_s=round(counts.tokens / seconds, 1),
        seconds=round(seconds, 2),
    )


def _missing(prompts: PromptReader, answers: AnswerFile, ledger: _Ledger) -> Iterator[RegenerationPrompt]:
    """Yield the prompts that have no answer yet."""
    for each in prompts:
        if isinstance(each, Reject):
            ledger.reject(each)
        elif (each.source, each.row) in answers:
            ledger.reuse()
        else:
            yield each


def _sampler(config: RegenerateConfig, target: Target, settings: AnswerSettings) -> VllmSampler:
    return VllmSampler(
        target,
        Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=stop_ids(target),
        ),
        dtype=settings.dtype,
        max_length=settings.max_length,
        seed=settings.seed,
        options=vllm_options(config),
    )


class _RejectFile:
    """The rows of one run without a prompt that can be served, beside the answers; replaced by every run."""

    def __init__(self, out: Path) -> None:
        self._path = rejects_file(out)
        # In the directory of the pieces, so that one which a killed run left goes with it.
        self._temporary = temporary_name(pieces_directory(out) / self._path.name)
        self._writer: Any = None
        self._pending: list[Reject] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with disk_errors(self._path):
            self._flush()
            if self._writer is not None:
                self._writer.close()
                self._temporary.rename(self._path)
            elif kind is None:
                self._path.unlink(missing_ok=True)

    def add(self, reject: Reject) -> None:
        """Note one row."""
        self._pending.append(reject)
        if len(self._pending) >= _REJECTS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            rows = [reject.model_dump() for reject in self._pending]
            with disk_errors(self._path):
                if self._writer is None:
                    self._writer = pq.ParquetWriter(self._temporary, REJECT_SCHEMA)
                self._writer.write_table(pa.Table.from_pylist(rows, schema=REJECT_SCHEMA))
            self._pending = []
