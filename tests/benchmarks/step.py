"""The training step beside slower ways to the same gradient, and beside the work that no way can do without.

floor        the same matrix products and flash attention, on inputs at hand, and nothing else
ours         the step as ``specx train`` takes it, without the optimizer
reference    eager: dense attention, every logit in memory
sdpa         the same with keys and values of all steps side by side in one call of torch's attention

They take turns in one process; a ratio is the median of those of the rounds. Memory is what a step adds to a process
of its own, at a draft vocabulary of 32,000 and 7 steps, against the same step with every logit in memory.

    python tests/benchmarks/step.py --json
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "train" / "families"))
import eager

from specx.train.data.batch import Batch
from specx.train.families.eagle3.draft import Eagle3Draft
from specx.train.families.eagle3.objective import Objective, unrolled_loss
from specx.train.families.eagle3.spec import Eagle3Spec
from specx.train.families.eagle3.unroll import unroll
from specx.train.layers.computed_rows import computed_rows
from specx.train.loss.anchors import supervised_anchors
from specx.train.loss.metrics import decayed_weights
from specx.train.loss.target_distribution import Vocabulary

THREADS = 2
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 256, 1024, 8, 2, 64
ROWS, LENGTH, BOUNDARIES, VOCABULARY = 2, 512, (1, 3, 5), 8192
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of the step."""

    dtype: torch.dtype
    draft_vocabulary: int = 2048
    steps: int = 3
    is_half: bool = False
    """Only the second half of each row is supervised."""


class Step:
    """A draft and a batch, and the ways to its gradient."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.weights = case, decayed_weights(case.steps, 0.8)
        vocabulary_size = max(VOCABULARY, case.draft_vocabulary)
        spec = Eagle3Spec(
            target_architecture="GptOssForCausalLM",
            num_target_layers=6,
            boundaries=BOUNDARIES,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            rms_norm_eps=1e-5,
            vocab_size=vocabulary_size,
            draft_vocab_size=case.draft_vocabulary,
            max_position_embeddings=131072,
            rope_parameters=YARN,
            norm_output=True,
            fc_norm=True,
        )
        self.draft = Eagle3Draft(spec)
        self.embed_tokens = torch.randn(vocabulary_size, HIDDEN).bfloat16()
        self.vocabulary = Vocabulary(
            d2t=torch.zeros(case.draft_vocabulary, dtype=torch.int64),
            t2d=torch.arange(vocabulary_size) < case.draft_vocabulary,
            target_head=(torch.randn(case.draft_vocabulary, HIDDEN) / 10).to(case.dtype),
        )
        shape = (ROWS, LENGTH)
        mask = torch.ones(shape, dtype=torch.bool)
        if case.is_half:
            mask[:, : LENGTH // 2] = False
        self.batch = Batch(
            input_ids=torch.randint(0, vocabulary_size, shape),
            loss_mask=mask,
            documents=torch.zeros(shape, dtype=torch.int64),
            positions=torch.arange(LENGTH).repeat(ROWS, 1),
            aux_hidden=torch.randn(*shape, len(BOUNDARIES), HIDDEN).bfloat16(),
            last_hidden=torch.randn(*shape, HIDDEN).bfloat16(),
            argmax=torch.randint(0, case.draft_vocabulary, shape),
            lse=torch.full(shape, 9.0),
        )
        self.batch = replace(self.batch, anchors=supervised_anchors(self.batch, case.steps))

    def ours(self, *, with_metrics: bool = False) -> None:
        objective = Objective(loss="cross_entropy", step_weights=self.weights)
        loss, _ = unrolled_loss(
            self.draft,
            self.embed_tokens,
            self.batch,
            self.vocabulary,
            objective,
            dtype=self.case.dtype,
            with_metrics=with_metrics,
        )
        self._backward(loss)

    def reference(self) -> None:
        with self._autocast():
            loss = eager.loss(self.draft, self.embed_tokens, self.batch, self.vocabulary, self.weights)
        self._backward(loss)

    def sdpa(self) -> None:
        with self._autocast():
            outputs = unroll_with_sdpa(self.draft, self.embed_tokens, self.batch, self.case.steps)
            loss = eager.loss_of(self.draft, outputs, self.batch, self.vocabulary, self.weights)
        self._backward(loss)

    def materialised(self) -> None:
        """Our own unroll, with the logits of all steps in memory."""
        rows = computed_rows(self.batch, supervised_anchors(self.batch, 1)[0])
        found = unroll(self.draft, self.embed_tokens, self.batch, rows, self.case.steps, self.case.dtype)
        outputs = [each.new_zeros(ROWS * LENGTH, HIDDEN).index_copy(0, rows.flat, each) for each in found]
        with self._autocast():
            shaped = [each.view(ROWS, LENGTH, HIDDEN) for each in outputs]
            loss = eager.loss_of(self.draft, shaped, self.batch, self.vocabulary, self.weights)
        self._backward(loss)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.case.dtype == torch.bfloat16)

    def _backward(self, loss: torch.Tensor) -> None:
        self.draft.zero_grad()
        loss.backward()


def unroll_with_sdpa(draft: Eagle3Draft, embed_tokens: torch.Tensor, batch: Batch, steps: int) -> list[torch.Tensor]:
    """``eager.unroll`` of one document a row, with one call of torch's attention a step."""
    dtype = draft.fc.weight.dtype
    embedded, hidden = draft.embed(batch.input_ids, embed_tokens).to(dtype), draft.fuse(batch.aux_hidden.to(dtype))
    T = batch.input_ids.shape[1]
    causal, own = torch.ones(T, T, dtype=torch.bool).tril(), torch.eye(T, dtype=torch.bool)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    outputs = []
    for step in range(steps):
        ahead = F.pad(embedded[:, step + 1 :], (0, 0, 0, step + 1))
        cos, sin = draft.rotary(hidden, batch.positions + step)
        inputs, entered = draft.enter(ahead, hidden)
        q, k, v = draft.attention.project(inputs, cos, sin)
        keys.append(k)
        values.append(v)
        mask = torch.cat((causal, *[own] * step), dim=1)
        attended = F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask)
        normed, hidden = draft.leave(entered, attended)
        outputs.append(normed)
    return outputs


def floor(dtype: torch.dtype, draft_vocabulary: int = 2048, steps: int = 3) -> Callable[[], None]:
    """Return what does the matrix products, forward and backward, and the attention of a step over all rows."""
    tokens, width = ROWS * LENGTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) / 20).to(dtype)

    # Width in, width out, times. The inputs of the first are data, so nothing is sent back to them.
    products = [
        (len(BOUNDARIES) * HIDDEN, HIDDEN, 1),
        (HIDDEN, width, 1 + steps),
        (HEADS * HEAD_DIM, HIDDEN, steps),
        (HIDDEN, INTERMEDIATE, 2 * steps),
        (INTERMEDIATE, HIDDEN, steps),
        (HIDDEN, draft_vocabulary, steps),
    ]
    operands = [(random(tokens, a), random(b, a), random(tokens, b), times) for a, b, times in products]
    last, head = random(tokens, HIDDEN), random(draft_vocabulary, HIDDEN)
    q, grad = (random(ROWS, HEADS, LENGTH, HEAD_DIM) for _ in range(2))
    k, v = (random(ROWS, KV_HEADS, LENGTH, HEAD_DIM) for _ in range(2))

    def run() -> None:
        for number, (x, weight, slope, times) in enumerate(operands):
            for _ in range(times):
                x @ weight.T
                if number:
                    slope @ weight
                slope.T @ x
        last @ head.T
        for _ in range(steps):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, True)

    return run


def timed(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Run each way once a round, after a warm-up; seconds by round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return round(statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True)), 3)


def compare(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times of one type, at both draft vocabularies."""
    torch.set_num_threads(THREADS)
    name = str(dtype).removeprefix("torch.")
    full, half = Step(Case(dtype=dtype)), Step(Case(dtype=dtype, is_half=True))
    ways = {
        "floor": floor(dtype),
        "full": full.ours,
        "half": half.ours,
        "reference": full.reference,
        "sdpa": full.sdpa,
    }
    seconds = timed(ways, rounds)
    result: dict[str, Any] = {
        f"{name}_{each}_over_floor": ratio(seconds, each, "floor") for each in ways if each != "floor"
    }
    spread = [a / b for a, b in zip(seconds["full"], seconds["floor"], strict=True)]
    result[f"{name}_full_over_floor_spread"] = [round(min(spread), 3), round(max(spread), 3)]
    result[f"{name}_ms"] = {each: round(statistics.median(times) * 1000, 1) for each, times in seconds.items()}
    large = Step(Case(dtype=dtype, draft_vocabulary=32_000))
    seconds = timed({"floor": floor(dtype, 32_000), "full": large.ours}, max(3, rounds // 4))
    result[f"{name}_full_over_floor_32000"] = ratio(seconds, "full", "floor")
    return result


def memory(way: str, dtype: torch.dtype) -> float:
    """Return the megabytes that the first step adds to what was there before."""
    torch.set_num_threads(THREADS)
    step = Step(Case(dtype=dtype, draft_vocabulary=32_000, steps=7))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    {"ours": step.ours, "materialised": step.materialised}[way]()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Run one measurement so that no other has left anything behind."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        result |= in_own_process(compare, dtype, arguments.rounds)
        name = str(dtype).removeprefix("torch.")
        peaks = {way: in_own_process(memory, way, dtype) for way in ("ours", "materialised")}
        result[f"{name}_peak_mb"] = {way: round(peak) for way, peak in peaks.items()}
        result[f"{name}_peak_over_materialised"] = round(peaks["ours"] / peaks["materialised"], 3)
    if not arguments.json:
        for key, value in result.items():
            print(f"{key:36} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
