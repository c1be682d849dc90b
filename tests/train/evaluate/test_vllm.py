"""Exported drafts in the real engine, on a CPU, in float32."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specx.train.check import TrainedDraft
from specx.train.draft import Draft
from specx.train.evaluate.chain import CachedTarget
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.decoder import DraftDecoder, load_draft
from specx.train.evaluate.prompts import read_prompts
from specx.train.export import export, read_trained, write_draft
from specx.train.run import RunDirectory

DRAFTED = 3


@pytest.fixture(scope="module")
def prompts(target: Path, regen: Path) -> list[list[int]]:
    config = EvaluateConfig(draft="", target=str(target), data=(str(regen / "dev.parquet"),), limit=10)
    return [prompt.ids for prompt in read_prompts(config)]


def serve(target: Path, draft: Path, prompts: list[list[int]], folder: Path) -> list[dict[str, Any]]:
    """Decode the prompts in vLLM; return output ids, proposals and accepted counts."""
    (folder / "prompts.json").write_text(json.dumps(prompts))
    script = Path(__file__).parent / "served.py"
    command = [sys.executable, str(script), str(target), str(draft), str(folder / "prompts.json")]
    finished = subprocess.run([*command, str(folder / "out.json")], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    served: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return served


def test_vllm_proposes_what_our_own_chain_proposes(
    tmp_path: Path, target: Path, trained_run: Path, prompts: list[list[int]]
) -> None:
    draft = tmp_path / "draft"
    export(trained_run, draft, dtype="float32")
    served = serve(target, draft, prompts, tmp_path)

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True)
    exported = load_draft(draft, torch.float32)
    equal = positions = 0
    for ids, request in zip(prompts, served, strict=True):
        whole = ids + request["output"]
        following, aux = CachedTarget(model, exported.draft.spec.boundaries).forward(whole)
        assert following[len(ids) - 1 : -1] == request["output"], "the engine's output is the target's own"
        decoder = DraftDecoder(exported, model.get_input_embeddings().weight)
        taken, known = 0, len(ids) + 1
        for proposed in request["proposals"]:
            decoder.extend(whole[taken + 1 : known], aux[taken : known - 1])
            taken = known - 1
            own = decoder.propose(DRAFTED)
            equal += sum(a == b for a, b in zip(own, proposed, strict=True))
            positions += DRAFTED
            accepted = next((i for i in range(DRAFTED) if whole[known + i : known + i + 1] != [proposed[i]]), DRAFTED)
            known += accepted + 1
            if known > len(whole):
                break
    assert positions >= 500
    assert equal / positions >= 0.99, f"{equal} of {positions}"
    accepted_counts = [count for request in served for count in request["accepted"]]
    assert 1 + sum(accepted_counts) / len(accepted_counts) > 1.5


def test_an_untrained_draft_is_accepted_no_better_than_chance(
    tmp_path: Path, target: Path, trained_run: Path, prompts: list[list[int]]
) -> None:
    trained = read_trained(RunDirectory(trained_run))
    torch.manual_seed(0)
    weights = {name: weight.detach() for name, weight in Draft(trained.spec).named_parameters()}
    untrained = TrainedDraft(
        spec=trained.spec,
        weights=weights,
        vocabulary=trained.vocabulary,
        inv_freq=trained.inv_freq,
        attention_scaling=trained.attention_scaling,
    )
    write_draft(tmp_path / "draft", untrained, "float32")
    accepted = [
        count for request in serve(target, tmp_path / "draft", prompts, tmp_path) for count in request["accepted"]
    ]
    assert 1 + sum(accepted) / len(accepted) == pytest.approx(1.0, abs=0.02)
