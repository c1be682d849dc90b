"""Run by ``test_vllm``: vLLM in a process of its own, noting every token its drafter proposes.

Usage: served.py TARGET DRAFT PROMPTS.json OUT.json. PROMPTS is a list of lists of
token ids; OUT holds, a prompt each, the output ids and the proposals in order.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# The engine in this very process, so that its drafter can be listened to.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from specx.train.evaluate.vllm import load_engine

NUM_SPECULATIVE_TOKENS = 3


def main(target: str, draft: str, prompts: str, out: str) -> None:
    speculative = {"method": "eagle3", "model": draft, "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
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
    for ids in json.loads(Path(prompts).read_text()):
        proposals.clear()
        completion = engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0].outputs[0]
        served.append(
            {
                "output": list(completion.token_ids),
                "proposals": list(proposals),
                "accepted": completion.spec_decode_metrics.per_step_accepted,
            }
        )
    Path(out).write_text(json.dumps(served))


if __name__ == "__main__":
    main(*sys.argv[1:])
