"""What extraction costs beside the prefill it cannot do without.

A random gpt-oss (hidden 512, 12 layers, vocabulary 32,000) reads the same prompts of
256 to 2048 random tokens in plain vLLM (``max_tokens=1``, nothing kept), in the vLLM
engine and in the transformers engine, the last two writing a store. Rounds are interleaved, every measurement has a
process of its own, and loading is left out. The figure is a ratio within a round.

    python tests/benchmarks/extract.py --json
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

VOCAB_SIZE = 32_000
LENGTHS = (256, 2048)


def save_target(directory: Path) -> None:
    """Write a random gpt-oss in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, GptOssConfig

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def prompts(count: int) -> list[list[int]]:
    """Return random token ids."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(LENGTHS[0], LENGTHS[1] + 1, count)
    return [generator.integers(3, VOCAB_SIZE, length).tolist() for length in lengths]


def plain_prefill(target: Path, count: int, workspace: Path) -> dict[str, float]:
    """Time vLLM alone, set up as the engine sets it up."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(target),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=not torch.cuda.is_available(),
        max_model_len=LENGTHS[1] + 2,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    requests = [{"prompt_token_ids": ids} for ids in prompts(count)]
    started = time.perf_counter()
    llm.generate(requests, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    # Its processes are no daemons: this one would wait for them.
    llm.llm_engine.engine_core.shutdown()
    return {"seconds": seconds}


def extract(engine_name: str, target: Path, count: int, workspace: Path) -> dict[str, float]:
    """Time an engine until its store is committed."""
    from specx.extract.config import ExtractConfig
    from specx.extract.data.samples import Sample
    from specx.extract.engines.factory import open_engine
    from specx.extract.pipeline import dataset_info
    from specx.extract.target import open_target
    from specx.storage.schema import Origin
    from specx.storage.store import FeatureStore

    with tempfile.TemporaryDirectory(dir=workspace) as folder:
        config = ExtractConfig(
            target=str(target), data=("unused",), store=f"{folder}/store", engine=engine_name, max_length=LENGTHS[1]
        )
        opened = open_target(config.target)
        info = dataset_info(config, opened)
        FeatureStore.create(config.store, info)
        samples = [
            Sample(
                input_ids=np.asarray(ids, np.int32),
                loss_mask=np.ones(len(ids), np.uint8),
                origin=Origin(source="random", row=row),
            )
            for row, ids in enumerate(prompts(count))
        ]
        engine = open_engine(config, opened, info)
        started = time.perf_counter()
        for sample in samples:
            engine.add(sample)
        engine.finish()
        seconds = time.perf_counter() - started
        outcome = engine.take()
        engine.close()
        assert len(outcome.committed) == len(samples), "not all was committed"
        return {"seconds": seconds, "wait_fraction": outcome.waited_s / seconds}


def in_own_process(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """Run one measurement so that no other has left anything behind."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=48, help="prompts of plain vLLM and the vLLM engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    few = max(1, arguments.sequences // 4)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        target = workspace / "target"
        save_target(target)
        tokens = sum(map(len, prompts(arguments.sequences)))
        few_tokens = sum(map(len, prompts(few)))
        for _ in range(arguments.rounds):
            plain = in_own_process(plain_prefill, target, arguments.sequences, workspace)
            ours = in_own_process(extract, "vllm", target, arguments.sequences, workspace)
            slow = in_own_process(extract, "transformers", target, few, workspace)
            rounds.append(
                {
                    "plain_tokens_per_s": round(tokens / plain["seconds"], 1),
                    "vllm_tokens_per_s": round(tokens / ours["seconds"], 1),
                    "transformers_tokens_per_s": round(few_tokens / slow["seconds"], 1),
                    "vllm_over_plain": round(plain["seconds"] / ours["seconds"], 4),
                    "vllm_wait_fraction": round(ours["wait_fraction"], 5),
                    "transformers_wait_fraction": round(slow["wait_fraction"], 5),
                }
            )
            if not arguments.json:
                print(rounds[-1])
    result = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    result |= {
        "vllm_over_plain_min": min(each["vllm_over_plain"] for each in rounds),
        "vllm_over_plain_max": max(each["vllm_over_plain"] for each in rounds),
        "sequences": arguments.sequences,
        "tokens": tokens,
        "rounds": arguments.rounds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
