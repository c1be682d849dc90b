"""The command line: one entry a command.

Nothing heavy is imported before a command runs, and nothing for other commands.
"""

import logging
import sys
from typing import Annotated

import typer

from . import SpecxError, __version__
from .commands import Command, command_group
from .startup import collect_rarely, train_imports

# Here, as vLLM's processes import this file first.
collect_rarely()

COMMANDS = {
    "extract": Command(
        "extract.config:ExtractConfig",
        "extract.pipeline:run",
        "Run the target once and write its hidden states and logits to a feature store.",
    ),
    "regenerate": Command(
        "extract.regenerate.config:RegenerateConfig",
        "extract.regenerate.pipeline:run",
        "Have the target answer prompts in vLLM, keeping the exact sampled ids; rerun to resume.",
    ),
    "train": Command(
        "train.config:TrainConfig",
        "train.pipeline:run",
        "Train a draft from a feature store; rerun to resume.",
        instead={"dry_run": ("train.dry_run:forecast", "Print estimated memory and time, then exit.")},
        importing=train_imports,
    ),
    "export": Command(
        "train.export.config:ExportConfig",
        "train.export.write:run",
        "Write the draft as vLLM and SGLang load it, and check what was written.",
    ),
    "evaluate": Command(
        "train.evaluate.config:EvaluateConfig",
        "train.evaluate.pipeline:run",
        "Measure a draft by real speculative decoding against the target alone, or estimate it from a store.",
    ),
    "rope-check": Command(
        "train.export.config:RopeCheckConfig",
        "train.export.rope_check:run",
        "Compare the rotary angles of a draft, as trained and as vLLM and SGLang build them, with the target's.",
        check="train.export.rope_check:check",
    ),
    "report": Command(
        "report.config:ReportConfig",
        "report.report:run",
        "Draw runs, one over the other, and stores in one HTML file that needs no network.",
    ),
}
STORE_COMMANDS = {
    "info": Command("storage.ops.config:InfoConfig", "storage.ops.info:run", "Show what is in a store."),
    "verify": Command(
        "storage.ops.config:VerifyConfig",
        "storage.ops.verify:run",
        "Check every byte of a store against its commit records.",
        check="storage.ops.verify:check",
    ),
    "select": Command(
        "storage.ops.config:SelectConfig", "storage.ops.select:run", "Name a subset of a store, for `train --view`."
    ),
    "merge": Command(
        "storage.ops.config:MergeConfig", "storage.ops.merge:run", "Add stores to another; rerun to resume."
    ),
    "prune": Command(
        "storage.ops.config:PruneConfig", "storage.ops.prune:run", "Write a smaller store of the same sequences."
    ),
    "gc": Command("storage.ops.config:GcConfig", "storage.ops.gc:run", "Remove what killed runs left behind."),
    "plan": Command(
        "extract.config:PlanConfig",
        "extract.plan:plan",
        "Estimate bytes, files and hours of an extraction before it runs.",
    ),
}


app = command_group(
    "Extract a target's features once; train speculative-decoding drafts from them as often as you like.", COMMANDS
)
app.add_typer(command_group("Inspect and manage a feature store.", STORE_COMMANDS), name="store")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"specx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show version.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("specx").setLevel(logging.INFO)


def main() -> None:
    """Run the command line; a SpecxError is one line on stderr and exit code 1. typer makes ^C 130."""
    try:
        app()
    except SpecxError as error:
        print(f"specx: {error}", file=sys.stderr)
        sys.exit(1)
