"""Several processes that train one draft together, and the one that waits for them.

Each ends with an outcome: its summary, that ^C was answered, or what went wrong. If
one fails all are ended, and the one that waits says why; none outlives it.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pkgutil import resolve_name
from types import FrameType
from typing import Any, Literal

from ... import SpecxError
from ...startup import without_collector, without_text_metrics
from ..config import TrainConfig
from ..errors import TrainError

_LOOK_EVERY_S = 0.2
_REASONS_WITHIN_S = 2.0
"""Where one process is lost the others fail for it; whether one of them knows more shows within so much time."""
_ENDING_S = 30.0

Work = Callable[[TrainConfig], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Outcome:
    kind: Literal["done", "interrupted", "refused", "failed"]
    summary: dict[str, Any] | None = None
    reason: str = ""
    """One line where refused, a traceback where failed"""


@dataclass(frozen=True, slots=True)
class _Rank:
    number: int
    process: SpawnProcess
    outcomes: Connection


def launch(config: TrainConfig, work: Work) -> dict[str, Any]:
    """Call ``work`` in as many processes as there are devices; return what it returned in the first.

    ``work`` finds its place among them in the environment, where Lightning looks for it. Raises TrainError if a
    process refuses to go on or is killed, KeyboardInterrupt once all have answered to ^C; a second one ends them.
    """
    ranks: list[_Rank] = []
    outcomes: dict[int, _Outcome] = {}
    with _interrupt_noted() as is_interrupted:
        try:
            port = _free_port()
            with _killed_quietly():
                for number in range(config.devices):
                    ranks.append(_start(config, work, number, port))
            lost = _wait(ranks, outcomes, is_interrupted)
        finally:
            for rank in ranks:
                if rank.number in outcomes and outcomes[rank.number].kind in ("done", "interrupted"):
                    rank.process.join(_ENDING_S)
                rank.process.kill()
                rank.process.join()
    return _result(lost, outcomes)


def _wait(ranks: list[_Rank], outcomes: dict[int, _Outcome], is_interrupted: threading.Event) -> list[_Rank]:
    """Fill ``outcomes`` until all are there, or one is that ends the run; return those that ended without."""
    lost: list[_Rank] = []
    waiting = {rank.outcomes: rank for rank in ranks}
    give_up_at: float | None = None
    while waiting and (give_up_at is None or time.monotonic() < give_up_at):
        for connection in wait(list(waiting), timeout=_LOOK_EVERY_S):
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                outcomes[rank.number] = connection.recv()
            except EOFError:
                lost.append(rank)
            outcome = outcomes.get(rank.number)
            if outcome is not None and outcome.kind == "refused":
                return lost
            if (outcome is None or outcome.kind == "failed") and give_up_at is None:
                give_up_at = time.monotonic() + _REASONS_WITHIN_S
        if is_interrupted.is_set():
            # More than once: one that is still starting does not listen yet.
            for rank in waiting.values():
                if rank.process.pid is not None and rank.process.is_alive():
                    os.kill(rank.process.pid, signal.SIGINT)
    return lost


def _result(lost: list[_Rank], outcomes: dict[int, _Outcome]) -> dict[str, Any]:
    found = list(outcomes.values())
    if refused := [outcome for outcome in found if outcome.kind == "refused"]:
        raise TrainError(refused[0].reason)
    if lost:
        raise TrainError(
            f"process {lost[0].number} of the run ended with exit code {lost[0].process.exitcode} "
            "(-9: killed, for lack of memory perhaps). What was saved is kept: rerun the same command to go on."
        )
    if failed := [outcome for outcome in found if outcome.kind == "failed"]:
        raise RuntimeError(failed[0].reason)
    if any(outcome.kind == "interrupted" for outcome in found):
        raise KeyboardInterrupt
    summary = outcomes[0].summary
    assert summary is not None
    return summary


def _start(config: TrainConfig, work: Work, number: int, port: int) -> _Rank:
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    level = logging.getLogger("specx").getEffectiveLevel()
    # By its name: where it is defined, lightning is imported.
    name = f"{work.__module__}:{work.__qualname__}"
    process = context.Process(target=_be_rank, args=(config, name, number, port, level, theirs), daemon=True)
    noted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # It inherits that ^C is ignored, until it can answer to one.
        process.start()
    finally:
        signal.signal(signal.SIGINT, noted)
    theirs.close()
    return _Rank(number, process, ours)


def _be_rank(config: TrainConfig, name: str, number: int, port: int, level: int, outcomes: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One of them speaks for all.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("specx").setLevel(level if number == 0 else max(level, logging.WARNING))
    os.environ |= {
        "LOCAL_RANK": str(number),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(config.devices),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with without_collector(), without_text_metrics():
            work: Work = resolve_name(name)
        outcome = _Outcome("done", summary=work(config))
    except KeyboardInterrupt:
        outcome = _Outcome("interrupted")
    except SpecxError as error:
        outcome = _Outcome("refused", reason=str(error))
    except Exception:  # raised again, with this traceback, by the one that waits
        outcome = _Outcome("failed", reason=traceback.format_exc())
    outcomes.send(outcome)
    if outcome.kind in ("refused", "failed"):
        # Ending now would make the others fail, and hide which of them was first.
        threading.Event().wait()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _interrupt_noted() -> Iterator[threading.Event]:
    """Note the first ^C while the block runs; a second one is not held back."""
    is_interrupted = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        is_interrupted.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield is_interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _killed_quietly() -> Iterator[None]:
    """Have Python's resource tracker, started with the first process, not warn of what a killed one left to it."""
    name = "PYTHONWARNINGS"
    found = os.environ.get(name)
    os.environ[name] = ",".join(filter(None, (found, "ignore:resource_tracker")))
    try:
        yield
    finally:
        if found is None:
            del os.environ[name]
        else:
            os.environ[name] = found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
