"""The other end of ``serve.py``: a project in a process of its own, asked by name."""

import json
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent


class ChildError(RuntimeError):
    """A project could not do what it was asked; the text is the last of what it printed."""


def seconds_to_first_step(name: str, python: Path, log: Path, command: list[str]) -> dict[str, float]:
    """Run a training command up to the end of its first optimizer step; return seconds, and processor seconds.

    Raises ChildError if it ends before.
    """
    started = time.perf_counter()
    # Compiling before a single step would be no gain.
    with start(python, log, "first_step.py", *command, TORCHDYNAMO_DISABLE="1") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
    if not line:
        raise ChildError(f"{name}: {last_line(log)}")
    return {"seconds": seconds} | json.loads(line)


def start(python: Path, log: Path, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a script of this folder in a project's environment; what it prints as errors is added to the log."""
    with log.open("a") as errors:
        return subprocess.Popen(
            [str(python), str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)} | environment,
        )


def last_line(log: Path) -> str:
    return log.read_text().strip().splitlines()[-1]


class Child:
    """One project's process."""

    def __init__(self, name: str, python: Path, log: Path) -> None:
        self.name = name
        self._log = log
        self._process = start(python, log, f"run_{name}.py")

    def ready(self) -> None:
        """Wait until everything is imported."""
        self._answer()

    def __call__(self, call: str, **arguments: object) -> Any:
        """Ask, and wait for the answer. Raises ChildError if the process ends instead."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        raise ChildError(f"{self.name}: {last_line(self._log)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End the process, if it has not ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
