"""What vLLM proposes with a draft against what our own chain proposes with it, in float32."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from specx.train.evaluate.engines.transformers_engine import CachedTarget
from specx.train.families.load import ExportedDraft, load_draft

DRAFTED = 3

Served = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A target and a draft, to decode some prompts with."""

    target: Path
    draft: Path
    prompts: list[list[int]]


def serve(jobs: dict[str, Job], folder: Path) -> dict[str, tuple[Job, Served]]:
    """Decode in one process of vLLM; return every job with its output ids, proposals and accepted counts."""
    listed = [{"target": str(job.target), "draft": str(job.draft), "prompts": job.prompts} for job in jobs.values()]
    (folder / "jobs.json").write_text(json.dumps(listed))
    script = Path(__file__).parent / "served.py"
    command = [sys.executable, str(script), str(folder / "jobs.json"), str(folder / "out.json")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-5000:]
    served: list[Served] = json.loads((folder / "out.json").read_text())
    return {name: (job, each) for (name, job), each in zip(jobs.items(), served, strict=True)}


def agreement(job: Job, served: Served, **changes: Any) -> tuple[int, int]:
    """Return how many of the proposed tokens our own chain proposes too, and of how many.

    ``changes`` make the chain read the same weights as a draft of another kind.
    """
    model = AutoModelForCausalLM.from_pretrained(job.target, dtype=torch.float32, local_files_only=True)
    exported = load_draft(job.draft, torch.float32)
    if changes:
        other = exported.family.build(exported.spec.model_copy(update=changes)).eval()
        other.load_state_dict(exported.draft.state_dict(), strict=False)
        exported = ExportedDraft(draft=other, vocabulary=exported.vocabulary)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    equal = positions = 0
    for ids, request in zip(job.prompts, served, strict=True):
        whole = ids + request["output"]
        following, features = CachedTarget(model, exported.draft.spec.boundaries).forward(whole)
        assert following[len(ids) - 1 : -1] == request["output"], "the engine's output is the target's own"
        decoder = exported.family.proposer(exported.draft, exported.vocabulary, embeddings, head)
        taken, known = 0, len(ids) + 1
        for proposed in request["proposals"]:
            decoder.extend(whole[taken + 1 : known], features[taken : known - 1])
            taken = known - 1
            own = decoder.propose(DRAFTED)
            equal += sum(a == b for a, b in zip(own, proposed, strict=True))
            positions += DRAFTED
            accepted = next((i for i in range(DRAFTED) if whole[known + i : known + i + 1] != [proposed[i]]), DRAFTED)
            known += accepted + 1
            if known > len(whole):
                break
    return equal, positions
