"""``specx regenerate``: have the target answer the prompts of some data, and keep the exact sampled ids."""

import datetime
import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ..storage.files import disk_errors, temporary_name
from ..storage.rejects import REJECT_SCHEMA
from ..storage.schema import Reject
from .answers import AnswerFile, AnswerSettings, read_settings
from .engines.opening import vllm_options
from .engines.vllm_sampling import Sampling, VllmSampler
from .progress import Progressed, Reporter, reporter
from .prompts import Prompt, PromptReader
from .regenerate_config import RegenerateConfig
from .target import Target, TargetError, identify, open_target

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
    rows: int = 0
    answers: int = 0
    tokens: int = 0
    reused: int = 0
    rejected: int = 0
    truncated: int = 0

    def progressed(self) -> Progressed:
        note = f"{self.answers:,} answers of {self.tokens:,} tokens, {self.reused} reused, {self.rejected} rejected"
        return Progressed(self.rows, self.tokens, note)


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
    settings = _settings(config, target, date)
    prompts = PromptReader(config, target, date)
    counts = _Counts()
    try:
        with AnswerFile(out, settings, answers_per_piece=config.answers_per_piece) as answers:
            with reporter(config.limit) as shown, _RejectFile(out) as rejects:
                missing = _missing(prompts, answers, rejects, counts, shown)
                if (first := next(missing, None)) is not None:
                    _answer(config, target, settings, chain([first], missing), prompts, answers, counts)
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


def _missing(
    prompts: PromptReader, answers: AnswerFile, rejects: "_RejectFile", counts: _Counts, shown: Reporter
) -> Iterator[Prompt]:
    """Yield the prompts that have no answer yet, counting all."""
    for each in prompts:
        counts.rows += 1
        if isinstance(each, Reject):
            counts.rejected += 1
            rejects.add(each)
        elif (each.source, each.row) in answers:
            counts.reused += 1
        else:
            yield each
        shown.show(counts.progressed())


def _answer(
    config: RegenerateConfig,
    target: Target,
    settings: AnswerSettings,
    missing: Iterable[Prompt],
    prompts: PromptReader,
    answers: AnswerFile,
    counts: _Counts,
) -> None:
    sampler = VllmSampler(
        target,
        Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=_stop_ids(target),
        ),
        dtype=settings.dtype,
        max_length=settings.max_length,
        seed=settings.seed,
        options=vllm_options(config),
    )
    try:
        for answer in sampler.answers(missing):
            answers.add(answer, prompts.text(answer.sampled))
            counts.answers += 1
            counts.tokens += len(answer.sampled)
            counts.truncated += answer.finish_reason == "length"
    finally:
        sampler.close()


def _settings(config: RegenerateConfig, target: Target, date: str) -> AnswerSettings:
    own = _generation_config(target)
    # As engines read it: sampling parameters of a target that does not sample by default mean nothing.
    samples = bool(own.get("do_sample"))

    def chosen(wanted: float | None, name: str, default: float) -> Any:
        if wanted is not None:
            return wanted
        return own.get(name, default) if samples else default

    return AnswerSettings(
        target=identify(target),
        dtype=target.dtype if config.dtype == "auto" else config.dtype,
        temperature=float(chosen(config.temperature, "temperature", 1.0)),
        top_p=float(chosen(config.top_p, "top_p", 1.0)),
        top_k=int(chosen(config.top_k, "top_k", 0)),
        max_new_tokens=config.max_new_tokens,
        max_length=min(config.max_length or target.max_length, target.max_length),
        seed=config.seed,
        reasoning_effort=config.reasoning_effort,
        date=date,
    )


def _stop_ids(target: Target) -> tuple[int, ...]:
    found = _generation_config(target).get("eos_token_id", target.config.get("eos_token_id"))
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(each, int) for each in ids):
        raise TargetError(f"{target.path}: eos_token_id is {found!r}, expected a token id or several.")
    return tuple(ids)


def _generation_config(target: Target) -> dict[str, Any]:
    path = target.path / "generation_config.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise TargetError(f"{path}: not JSON: {error}. Download the model again.") from error
    if not isinstance(found, dict):
        raise TargetError(f"{path}: expected an object, found a {type(found).__name__}. Download it again.")
    return found


class _RejectFile:
    """The rows of one run without a prompt that can be served, beside the answers; replaced by every run."""

    def __init__(self, out: Path) -> None:
        self._path = out.with_suffix(".rejects.parquet")
        self._temporary = temporary_name(self._path)
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
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._temporary, REJECT_SCHEMA)
            rows = [reject.model_dump() for reject in self._pending]
            self._writer.write_table(pa.Table.from_pylist(rows, schema=REJECT_SCHEMA))
            self._pending = []
