"""Run by ``test_family``: vLLM in a process of its own, noting every token its drafter proposes.

Usage: served.py JOBS.json OUT.json. JOBS is a list of {"target", "draft", "prompts"}, prompts a list of lists of
token ids, decoded one engine after the other. OUT holds a list a job: each prompt's output ids, and the proposals
in order.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# The engine in this very process, so that its drafter can be listened to.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Several engines one after the other leave some of it behind.
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

from specx.train.evaluate.engines.vllm_engine import load_engine
from specx.train.families.load import recognize

NUM_SPECULATIVE_TOKENS = 3


def main(jobs: str, out: str) -> None:
    found = []
    for job in json.loads(Path(jobs).read_text()):
        started = time.monotonic()
        found.append(decode(**job))
        clean_up()
        print(f"{job['draft']}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    Path(out).write_text(json.dumps(found))


def decode(target: str, draft: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    config = json.loads((Path(draft) / "config.json").read_text())
    speculative = {
        "method": recognize(config).checkpoint.vllm_method(),
        "model": draft,
        "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
    }
    engine = load_engine(Path(target), "float32", speculative)
    from vllm import SamplingParams

    drafter = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter
    propose = drafter.propose
    proposals: list[list[int]] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        proposed = propose(*arguments, **options)
        proposals.extend(proposed.tolist())
        return proposed

    drafter.propose = noted
    sampling = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True, detokenize=False)
    served = []
    for ids in prompts:
        proposals.clear()
        completion = engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0].outputs[0]
        served.append(
            {
                "output": list(completion.token_ids),
                "proposals": list(proposals),
                "accepted": completion.spec_decode_metrics.per_step_accepted,
            }
        )
    return served


def clean_up() -> None:
    """Give back what an engine leaves in its process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
