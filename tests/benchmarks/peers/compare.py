"""specx beside the other trainers of EAGLE-3 drafts, each in its own environment, in one interleaved run.

store   the same 200 sequences, 200 to 2048 tokens at hidden size 2880, three boundaries and the last hidden state,
        written in blocks that take turns, and read in random order to batches
step    forward, loss and backward at hidden size 256, two rows of 512 tokens, 3 unrolled steps
start   from the training command to the end of its first optimizer step, on a finished store of 200 sequences of 512
        tokens at hidden size 256, and of 2000

Every project is a process that lives through a measurement, and each round asks all of them once. A ratio is the
median of those of the rounds, ours over theirs, with the least and the largest beside it.

    python tests/benchmarks/peers/compare.py --json
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from child import Child, ChildError, seconds_to_first_step
from environments import OURS, PEERS, create

sys.path.append(str(Path(__file__).parents[1]))

from sequences import load_pool, make_pool, wide_length, wide_sequence

from report import print_report

BLOCK = 20
"""Sequences that one writes before it is another's turn."""
VARIANTS = {
    "ours": ("lossless", "int8", "none"),
    "speculators": ("bf16", "fp8"),
    "specforge": ("bf16",),
    "modelopt": ("bf16",),
    "automodel": ("bf16 top-128",),
}
BESIDE = ("lossless", "none")
"""Ours that a peer's store is read in turns with."""
WAYS = {"ours": ("plain", "metrics", "floor")}
"""Ways to take a step; one, ``plain``, if none are named. The floor is the products and the attention alone,
of all rows."""
CASES = [(dtype, is_half) for dtype in ("float32", "bfloat16") for is_half in (False, True)]
WORKERS = (0, 2)
START_SEQUENCES = (200, 2000)
"""Of the stores that training starts from."""
WARM_UP = 2
PAUSE_S = 0.05
"""Between turns: threads that have just worked spin for a moment before they sleep, on a core of whose turn it is."""
Seconds = dict[str, list[dict[str, float]]]


class Comparison:
    """All that can be compared on this machine."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self.missing: dict[str, str] = {}
        """What pip, or the peer itself, said where there is no result, by peer."""
        self._pythons: dict[str, Path] = {}
        for project in (OURS, *PEERS):
            print(f"{project.name}: environment", file=sys.stderr, flush=True)
            if error := create(project):
                self.missing[project.name] = error
            else:
                self._pythons[project.name] = project.python
        if OURS.name in self.missing:
            raise ChildError(f"{OURS.name}: {self.missing[OURS.name]}")
        # Before anything here loads torch, which reads them once.
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "2",
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep a process of each, for as long as the block lasts."""
        with ExitStack() as self._stack:
            self._children = {name: self._stack.enter_context(self._child(name)) for name in self._pythons}
            for name, child in list(self._children.items()):
                with self._excusing(name):
                    child.ready()
            yield

    def _child(self, name: str) -> Child:
        return Child(name, self._pythons[name], self._log(name))

    def _begin_anew(self, name: str) -> None:
        """Start a process anew: memory that the old one has let go of is at hand for what it does next."""
        self._children[name].end()
        self._children[name] = self._stack.enter_context(self._child(name))
        self._children[name].ready()

    def _log(self, name: str) -> Path:
        return self._workspace / f"{name}.log"

    def versions(self) -> dict[str, dict[str, str]]:
        return {name: child("about") for name, child in self._children.items()}

    @contextmanager
    def _excusing(self, name: str) -> Iterator[None]:
        """Let one project do its part; if a peer ends over it, it is asked for no more."""
        try:
            yield
        except ChildError as error:
            if name == "ours":
                raise
            self.missing[name] = str(error)
            del self._children[name]

    def _complete(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return what was found of those that came to the end; a key begins with a project's name."""
        return {key: each for key, each in found.items() if key.partition(" ")[0] in self._children}

    def write(self, count: int) -> dict[str, dict[str, Any]]:
        """Write every variant; return bytes a token, error, and the seconds of each block."""
        make_pool(self._workspace)
        pool = load_pool(self._workspace)
        seconds: Seconds = {}
        errors: dict[str, float] = {}
        for first in range(0, count, BLOCK):
            stop = min(first + BLOCK, count)
            make_block(self._workspace, pool, range(first, stop))
            for name, variant in self._variants():
                block = {"first": first, "stop": stop, "is_last": stop == count}
                with self._excusing(name):
                    found = self._children[name]("write", workspace=str(self._workspace), variant=variant, **block)
                    seconds.setdefault(f"{name} {variant}", []).append(found)
            progress("write", stop, count)
        packages = {name: child("about")["package"] for name, child in self._children.items()}
        for name, variant in self._variants():
            errors[f"{name} {variant}"] = self._children[name]("error", variant=variant)
        tokens = sum(wide_length(number) for number in range(count))
        self.folders = {
            f"{name} {variant}": self._workspace / f"{packages[name]}-{variant}" for name, variant in self._variants()
        }
        return {
            key: {"bytes_per_token": round(size(self.folders[key]) / tokens, 1), "error": round(errors[key], 5)}
            | {"written": blocks}
            for key, blocks in self._complete(seconds).items()
        }

    def _variants(self) -> Iterator[tuple[str, str]]:
        """Yield the stores of those that still answer when it is their turn."""
        for name in list(self._children):
            for variant in VARIANTS[name]:
                if name in self._children:
                    yield name, variant

    def first_batch(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Open every store anew each round and return the seconds until its first batch is there."""
        seconds: Seconds = {}
        for number in range(rounds):
            for name, variant in self._variants():
                warm(self.folders[f"{name} {variant}"])
                with self._excusing(name):
                    found = self._children[name]("first_batch", workspace=str(self._workspace), variant=variant)
                    seconds.setdefault(f"{name} {variant}", []).append(found)
            progress("first batch", number + 1, rounds)
        return {key: {"first_batch": each} for key, each in self._complete(seconds).items()}

    def read(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Read every variant once a round; return the processes that were best, and tokens a second by round.

        Not all stores fit into memory, so each of a peer's is read in turns with ours alone, ``beside`` it, once they
        are warm and nothing of the others is left there, and in processes that have done nothing before. The processor
        seconds are those of the reading process: none of its workers.
        """
        found: dict[str, dict[str, Any]] = {
            f"{name} {variant}": {"workers": 0, "tokens_per_s": [], "tokens_per_cpu_s": []}
            for name, variant in self._variants()
        }
        for name, variant in self._variants():
            key = f"{name} {variant}"
            beside = [] if name == "ours" else [f"ours {codec}" for codec in BESIDE]
            rates: dict[str, list[tuple[float, float]]] = {each: [] for each in (*beside, key)}
            for each in self.folders.keys() - rates.keys():
                cool(self.folders[each])
            for each in rates:
                warm(self.folders[each])
            self._begin_anew("ours")
            with self._excusing(name):
                if name != "ours":
                    self._begin_anew(name)
                    found[key]["workers"] = self._best_workers(name, variant)
                for _ in range(rounds + 1):
                    for each in rates:
                        rates[each].append(self._rate(each, found[each]["workers"]))
                self._children[name]("forget", variant=variant, workers=found[key]["workers"])
            for each in rates:
                # The first time there is memory to be had for batches.
                found[each]["tokens_per_s"] += [per_s for per_s, _ in rates[each][1:]]
                found[each]["tokens_per_cpu_s"] += [per_cpu_s for _, per_cpu_s in rates[each][1:]]
            found[key]["beside"] = {each: [per_s for per_s, _ in rates[each][1:]] for each in beside}
            progress(f"read {key}", rounds, rounds)
        return self._complete(found)

    def _best_workers(self, name: str, variant: str) -> int:
        """Return how many reading processes are fastest, of the better of two readings each."""
        tried = {workers: max(self._rate(f"{name} {variant}", workers)[0] for _ in range(2)) for workers in WORKERS}
        best = max(tried, key=lambda workers: tried[workers])
        for workers in tried.keys() - {best}:
            self._children[name]("forget", variant=variant, workers=workers)
        return best

    def _rate(self, key: str, workers: int) -> tuple[float, float]:
        """Read a store once; return tokens a second, and a processor second."""
        name, _, variant = key.partition(" ")
        found = self._children[name]("read", workspace=str(self._workspace), variant=variant, workers=workers)
        return found["tokens"] / found["seconds"], found["tokens"] / found["cpu_s"]

    def step(self, rounds: int) -> dict[str, Seconds]:
        """Take every step once a round, after a warm-up; return the seconds by case."""
        found: dict[str, Seconds] = {}
        for dtype, is_half in CASES:
            seconds: Seconds = {}
            for number in range(rounds + WARM_UP):
                for name, child in list(self._children.items()):
                    with self._excusing(name):
                        for way in WAYS.get(name, ("plain",)):
                            time.sleep(PAUSE_S)
                            taken = child("step", dtype=dtype, is_half=is_half, way=way)
                            if number >= WARM_UP:
                                seconds.setdefault(f"{name} {way}", []).append(taken)
                progress(f"step {dtype} {'half' if is_half else 'full'}", number + 1, rounds + WARM_UP)
            found[f"{dtype} {'half' if is_half else 'full'}"] = seconds
        return {case: self._complete(seconds) for case, seconds in found.items()}

    def start(self, rounds: int) -> dict[str, Any]:
        """Run everybody's training command each round; return seconds by the sequences of the store, and the floor's.

        The round before the first is for libraries to be in memory.
        """
        target = self._workspace / "target"
        self._children["ours"]("write_target", folder=str(target))
        floor = [seconds_to_an_optimizer() for _ in range(rounds + 1)][1:]
        found: dict[str, Seconds] = {}
        for count in START_SEQUENCES:
            with tempfile.TemporaryDirectory(dir=self._workspace) as folder:
                seconds = self._start(Path(folder), target, rounds, count)
            found[str(count)] = seconds
        return {"start": {count: self._complete(seconds) for count, seconds in found.items()}, "start_floor": floor}

    def _start(self, folder: Path, target: Path, rounds: int, count: int) -> Seconds:
        out = folder / "out"
        commands: dict[str, list[str]] = {}
        for name, child in list(self._children.items()):
            with self._excusing(name):
                child("write_small", folder=str(folder / name), count=count)
                commands[name] = child("training_command", folder=str(folder / name), target=str(target), out=str(out))
        seconds: Seconds = {}
        for number in range(rounds + 1):
            for name in [each for each in commands if each in self._children]:
                shutil.rmtree(out, ignore_errors=True)
                warm(folder / name)
                with self._excusing(name):
                    taken = seconds_to_first_step(name, self._pythons[name], self._log(name), commands[name])
                    if number:
                        seconds.setdefault(name, []).append(taken)
            progress(f"start, {count} sequences", number, rounds)
        return seconds


def make_block(workspace: Path, pool: dict[str, Any], numbers: range) -> None:
    """Lay out the sequences that everybody writes next, a file an array."""
    shutil.rmtree(workspace / "block", ignore_errors=True)
    for number in numbers:
        folder = workspace / "block" / str(number)
        folder.mkdir(parents=True)
        for name, rows in wide_sequence(pool, number).items():
            np.save(folder / f"{name}.npy", rows)


def seconds_to_an_optimizer() -> float:
    """Start a process that imports torch and makes an AdamW, which nobody who trains does without."""
    code = "import gc; gc.disable(); import torch; torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]); print()"
    started = time.perf_counter()
    with subprocess.Popen([str(OURS.python), "-u", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return time.perf_counter() - started


def progress(what: str, done: int, of: int) -> None:
    print(f"{what}: {done} of {of}", file=sys.stderr, flush=True)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def warm(folder: Path) -> None:
    """Have the files in memory."""
    memory = bytearray(1 << 24)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(memory):
                    pass


def cool(folder: Path) -> None:
    """Have the files out of memory: where it is full, what is warmed lies there in small pieces."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                # What is not on the disk yet stays.
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def compare(arguments: argparse.Namespace, workspace: Path) -> dict[str, Any]:
    comparison = Comparison(workspace)
    with comparison.running():
        result: dict[str, Any] = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "load": list(os.getloadavg()),
            "versions": comparison.versions(),
            "missing": comparison.missing,
            "sequences": arguments.sequences,
            "rounds": {"step": arguments.rounds, "read": arguments.read_rounds, "start": arguments.start_rounds},
        }
        if "step" in arguments.only:
            result["step"] = comparison.step(arguments.rounds)
        if "start" in arguments.only:
            result |= comparison.start(arguments.start_rounds)
        if "store" in arguments.only:
            result["store"] = comparison.write(arguments.sequences)
            for measure in (comparison.first_batch, comparison.read):
                found = measure(arguments.read_rounds)
                result["store"] = {key: each | found[key] for key, each in result["store"].items() if key in found}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15, help="of the step")
    parser.add_argument("--read-rounds", type=int, default=5)
    parser.add_argument("--start-rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=("step", "start", "store"), default=["step", "start", "store"])
    parser.add_argument("--folder", type=Path, help="Where 40 GB may be written; a temporary one by default.")
    parser.add_argument("--json", action="store_true", help="Print every round as well.")
    arguments = parser.parse_args()
    workspace = Path(tempfile.mkdtemp(prefix="specx-peers-", dir=arguments.folder))
    try:
        result = compare(arguments, workspace)
    finally:
        shutil.rmtree(workspace)
    if arguments.json:
        print(json.dumps(result))
    print_report(result)


if __name__ == "__main__":
    main()
