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


@dataclass(frozen=True, slots=True)
class Progressed:
    """How far a run is."""

    rows: int
    """Read from the data."""
    tokens: int
    """Done, for the rate."""
    note: str
    """What was done, in words."""


class Reporter:
    """Shows a run's progress as it grows."""

    def __init__(self, progress: Progress | None, total_rows: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("rows", total=total_rows, note="") if progress else None
        self._started = self._last_line = time.monotonic()

    def show(self, done: Progressed) -> None:
        """Show the state of a run; called after each row."""
        now = time.monotonic()
        if self._progress is None and now - self._last_line < _LINE_EVERY_S:
            return
        note = f"{done.note}, {done.tokens / max(now - self._started, 1e-9):,.0f} tokens/s"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done.rows, note=note)
        else:
            self._last_line = now
            _log.info("%d rows: %s", done.rows, note)


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
