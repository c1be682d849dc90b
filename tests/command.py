"""The command line in a process of its own, forked from one that has imported what commands need.

Importing takes longer than most commands of the tests, so it is done once. Environment and folder are those of the
test, except for what a library looks up as it is imported: a test of that starts ``program.SPECX``.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "specx.cli",
        "specx.extract.pipeline",
        "specx.train.pipeline",
        "specx.tests.command",
        "transformers.models.gpt_oss.modeling_gpt_oss",
    ]
)


def run_command(arguments: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end; raise TimeoutExpired after so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_run, args=(arguments, dict(os.environ), Path.cwd(), streams))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout)
        assert process.exitcode is not None
        stdout, stderr = (each.read_text() for each in streams)
    return subprocess.CompletedProcess(arguments, process.exitcode, stdout, stderr)


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one line a command failed with."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("specx: ")] == lines[-1:]
    return lines[-1]


def _run(arguments: list[str], environment: dict[str, str], folder: Path, streams: list[Path]) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["specx", *arguments]
    from specx.cli import main

    main()
