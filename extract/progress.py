"""How far a run is: a bar on a terminal, a line now and then elsewhere. All on stderr."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LINE_EVERY_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Counts:
    """What a run has done so far."""

    rows: int = 0
    """Samples and rejects read from the data."""
    committed: int = 0
    """Sequences this run added to the store."""
    tokens: int = 0
    """Of these."""
    waited_s: float = 0.0
    """Time engines stood still for their writers, all engines together."""
    rejected: int = 0


class Reporter:
    """Shows counts as they grow."""

    def __init__(self, progress: Progress | None, total_rows: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("extract", total=total_rows, note="") if progress else None
        self._started = self._last_line = time.monotonic()

    def show(self, counts: Counts) -> None:
        """Show the state of a run; called after each row."""
        now = time.monotonic()
        if self._progress is None and now - self._last_line < _LINE_EVERY_S:
            return
        rate = counts.tokens / max(now - self._started, 1e-9)
        done = f"{counts.committed:,} sequences and {counts.tokens:,} tokens committed"
        note = f"{done}, {rate:,.0f} tokens/s, {counts.rejected} rejected"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=counts.rows, note=note)
        else:
            self._last_line = now
            _log.info("%d rows: %s", counts.rows, note)


@contextmanager
def reporter(total_rows: int | None) -> Iterator[Reporter]:
    """Show progress while the block runs; ``total_rows`` is None where it is not known."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Reporter(None, total_rows)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        yield Reporter(progress, total_rows)
