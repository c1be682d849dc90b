"""What extraction needs in memory beside vLLM, and that it does not grow with the data.

The same vLLM engine reads the same prompts three times: alone, and extracting n and
10 n sequences, each in a fresh process tree whose peak resident memory is sampled.

    python tests/benchmarks/extract_memory.py --json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

DATA = Path(__file__).parents[1] / "data"
LENGTHS = (100, 400)


def write_rows(path: Path, count: int) -> None:
    """Write ``count`` different sequences of random token ids."""
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(count):
            length = int(generator.integers(*LENGTHS))
            ids = generator.integers(20, 2000, length).tolist()
            file.write(json.dumps({"input_ids": ids, "loss_mask": [0] + [1] * (length - 1)}) + "\n")


def peak_of_tree(command: list[str]) -> tuple[int, float]:
    """Run a command; return the peak of its processes' unshared memory together, in bytes, and its seconds."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for each in [root, *root.children(recursive=True)]:
                try:
                    total += each.memory_full_info().uss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    return peak, time.monotonic() - started


def plain_prefill(data: Path) -> None:
    """Run vLLM alone over the prompts, as the engine sets it up."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(DATA / "tiny-gpt-oss"),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    prompts = [{"prompt_token_ids": json.loads(line)["input_ids"]} for line in data.read_text().splitlines()]
    llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, detokenize=False), use_tqdm=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        plain_prefill(arguments.plain)
        return
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few.jsonl", Path(folder) / "many.jsonl"
        write_rows(few, arguments.sequences)
        write_rows(many, 10 * arguments.sequences)

        def extract(data: Path) -> list[str]:
            specx = [sys.executable, "-c", "from specx.cli import main; main()", "extract", "--engine", "vllm"]
            store = f"{folder}/{data.stem}"
            return [*specx, "--target", str(DATA / "tiny-gpt-oss"), "--data", str(data), "--store", store]

        alone, _ = peak_of_tree([sys.executable, __file__, "--plain", str(few)])
        small, _ = peak_of_tree(extract(few))
        large, _ = peak_of_tree(extract(many))
    megabytes = 1 << 20
    result = {
        "vllm_alone_mb": alone // megabytes,
        "extract_mb": small // megabytes,
        "extract_10x_mb": large // megabytes,
        "beyond_vllm_10x_mb": (large - alone) // megabytes,
        "growth_mb": (large - small) // megabytes,
        "sequences": arguments.sequences,
    }
    print(json.dumps(result) if arguments.json else "\n".join(f"{key:20} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
