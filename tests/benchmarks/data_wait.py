"""How long training waits for its data, from a local store and from S3, and what a dry run foretells.

A draft of a target with hidden size 256 (8 heads, 2 key heads of 64, vocabulary 8192, draft vocabulary 2048) is
trained with 3 unrolled steps on steps of two sequences of 512 tokens. The features are made up: of real ones only the
sizes matter here. The S3 server is moto in a process of its own, on the same machine and cores.

    python tests/benchmarks/data_wait.py --json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sequences import SMALL_DRAFT_V, SMALL_H, SMALL_K, SMALL_LENGTH, SMALL_V, small_sequence

STEPS_UNROLLED = 3
SERVER = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

class Quiet(WSGIRequestHandler):
    def log(self, *_):
        pass

app = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
print(server.server_port, flush=True)
server.serve_forever()
"""


def make_store(url: str, sequences: int) -> None:
    """Write a store of made-up features of half-supervised sequences, and what training needs of a target."""
    import torch
    from safetensors.torch import save_file
    from transformers import GptOssConfig

    from specx.storage.schema import DatasetInfo, Origin, SequenceFeatures, TargetIdentity
    from specx.storage.store import FeatureStore
    from specx.storage.writer import FeatureWriter

    identity = TargetIdentity(architecture="GptOssForCausalLM", config_hash="a" * 64, weights_hash="b" * 64)
    info = DatasetInfo(
        target=identity,
        compute_dtype="bfloat16",
        boundaries=(1, 3, 5),
        hidden_size=SMALL_H,
        vocab_size=SMALL_V,
        top_k=SMALL_K,
        codec="lossless",
    )
    store = FeatureStore.create(url, info)
    config = GptOssConfig(
        hidden_size=SMALL_H, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        intermediate_size=4 * SMALL_H, vocab_size=SMALL_V, num_local_experts=4, architectures=["GptOssForCausalLM"],
    )  # fmt: skip
    with store.new_target() as folder:
        config.save_pretrained(folder)
        heads = {name: torch.randn(SMALL_V, SMALL_H) / SMALL_H**0.5 for name in ("embed_tokens", "lm_head")}
        save_file(heads, folder / "head.safetensors")

    with FeatureWriter(store, tokens_per_part=24_576) as writer:
        for row in range(sequences):
            writer.add(SequenceFeatures(**small_sequence(row)), Origin(source="made up", row=row))


def settings(store: str, out: Path, steps: int) -> dict[str, Any]:
    return {
        "store": store,
        "out": str(out),
        "max_steps": steps,
        "step_tokens": 2 * SMALL_LENGTH,
        "ttt_steps": STEPS_UNROLLED,
        "draft_vocab_size": SMALL_DRAFT_V,
        "holdout_fraction": 0.0,
        "checkpoint_every": 1_000_000,
        "log_every": 10,
        "loggers": ["csv"],
    }


def peak_bytes() -> int:
    """Return the most memory that this process has held; ``ru_maxrss`` would count its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def train(values: dict[str, Any], results: Any) -> None:
    """Train in a process of its own; put the summary and the memory that training added into ``results``."""
    from specx.train.config import TrainConfig
    from specx.train.pipeline import run

    before = peak_bytes()
    summary = run(TrainConfig.model_validate(values))
    results.send((summary, peak_bytes() - before))


def in_process(work: Any, *arguments: Any) -> Any:
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*arguments, theirs))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def foretell(values: dict[str, Any], results: Any) -> None:
    from specx.train.config import TrainConfig
    from specx.train.dry_run import forecast

    results.send(forecast(TrainConfig.model_validate(values)))


@contextmanager
def s3_server() -> Iterator[str]:
    """Give the URL of an empty bucket, which the environment of this process leads to."""
    import urllib.request

    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "made-up",
            "AWS_SECRET_ACCESS_KEY": "made-up",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bench", method="PUT")):
            pass
        try:
            yield "s3://bench/store"
        finally:
            server.terminate()


def measure(steps: int, sequences: int) -> dict[str, Any]:
    """Train from both places, and compare the local run with what was foretold of it."""
    found: dict[str, Any] = {"steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        local = str(workspace / "store")
        make_store(local, sequences)
        foretold = in_process(foretell, settings(local, workspace / "local", steps))
        summary, added = in_process(train, settings(local, workspace / "local", steps))
        found["local_data_wait_fraction"] = summary.data_wait_fraction
        found["local_tokens_per_s"] = summary.tokens_per_s
        found["step_s"] = round(summary.seconds / summary.steps, 4)
        found["foretold_step_s"] = foretold.step_s
        found["added_bytes"] = added
        found["foretold_bytes"] = foretold.peak_bytes
        with s3_server() as remote:
            make_store(remote, sequences)
            summary, _ = in_process(train, settings(remote, workspace / "s3", steps))
        found["s3_data_wait_fraction"] = summary.data_wait_fraction
        found["s3_tokens_per_s"] = summary.tokens_per_s
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--sequences", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.steps, arguments.sequences)
    print(json.dumps(result) if arguments.json else "\n".join(f"{key:<26}{value}" for key, value in result.items()))
