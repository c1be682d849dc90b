"""The command line: parses, builds a config, calls one function, prints one summary.

Nothing heavy is imported before a command runs.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import SpecxError, __version__, cli_store
from .options import CODECS, AsJson, RunFile, integers, show
from .startup import collect_rarely, import_torch, without_collector, without_text_metrics

# Here, as vLLM's processes import this file first.
collect_rarely()
app = typer.Typer(
    help="Dump a target's features once; train speculative-decoding drafts from them as often as you like.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_store.app, name="store")

ExportDtype = Literal["bfloat16", "float32"]
ExportFormat = Literal["eagle3", "speculators"]
ExportEngine = Literal["vllm", "sglang", "both"]
CheckpointOption = Literal["best", "last"]
_DATA_HELP = (
    "The target's own answers: a Parquet or JSON-lines file, a directory, a quoted pattern, or a data set's splits as "
    "ORG/NAME:SPLIT[,SPLIT] or ORG/NAME:CONFIG/SPLIT. May be repeated."
)
_PROMPTS_HELP = "Conversations to answer: what `specx extract` reads as --data. A last answer in them is left out."


@app.command()
def extract(
    target: Annotated[str | None, typer.Option(help="Local directory or hub id of the target.")] = None,
    data: Annotated[list[str] | None, typer.Option(help=_DATA_HELP)] = None,
    store: Annotated[str | None, typer.Option(help="Feature store to create or extend.")] = None,
    engine: Annotated[str | None, typer.Option(help="What runs the target: auto, transformers or vllm.")] = None,
    boundaries: Annotated[str | None, typer.Option(help="Auxiliary hidden states to keep, such as 2,12,21.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Logits kept per token.")] = None,
    codec: Annotated[str | None, typer.Option(help=f"{CODECS}.")] = None,
    last_hidden: Annotated[
        bool | None, typer.Option("--last-hidden/--no-last-hidden", help="Keep what gives exact targets.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence in tokens.")] = None,
    view: Annotated[str | None, typer.Option(help="Remember these sequences under a name, for train --view.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows to read of all data together.")] = None,
    too_long: Annotated[str | None, typer.Option(help="What happens to a longer sequence: reject or truncate.")] = None,
    shard: Annotated[str | None, typer.Option(help="Every n-th row from the i-th on, as i/n, such as 0/4.")] = None,
    turns: Annotated[str | None, typer.Option(help="Answers that are the target's own: last or all.")] = None,
    reasoning_effort: Annotated[str | None, typer.Option(help="Effort in the prompt of rows that name none.")] = None,
    date: Annotated[str | None, typer.Option(help="YYYY-MM-DD in the prompt of rows that name none.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Column of conversations.")] = None,
    input_ids_column: Annotated[str | None, typer.Option(help="Column of recorded token ids.")] = None,
    loss_mask_column: Annotated[str | None, typer.Option(help="Column of their mask.")] = None,
    category_column: Annotated[str | None, typer.Option(help="Column of categories.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type the target runs in: auto, float32, bfloat16.")] = None,
    workers: Annotated[int | None, typer.Option(help="Engines over the one store, in Ray actors if several.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to run on: auto or HOST:PORT.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="GPUs of one vLLM engine that share a layer.")] = None,
    pipeline_parallel: Annotated[
        int | None, typer.Option(help="Stages of a vLLM engine; vLLM 0.32 takes only 1.")
    ] = None,
    expert_parallel: Annotated[
        bool | None, typer.Option("--expert-parallel", help="GPUs of --tensor-parallel hold whole experts.")
    ] = None,
    force: Annotated[
        bool | None, typer.Option("--force", help="Start although the disk is expected to be too small.")
    ] = None,
    config: RunFile = None,
    as_json: AsJson = False,
) -> None:
    """Run the target once and write its hidden states and logits to a feature store."""
    from .config import load_config
    from .extract.config import ExtractConfig

    options = {
        "target": target,
        "data": data or None,
        "store": store,
        "engine": engine,
        "boundaries": integers("--boundaries", boundaries),
        "top_k": top_k,
        "codec": codec,
        "last_hidden": last_hidden,
        "max_length": max_length,
        "view": view,
        "limit": limit,
        "too_long": too_long,
        "shard": shard,
        "turns": turns,
        "reasoning_effort": reasoning_effort,
        "date": date,
        "messages_column": messages_column,
        "input_ids_column": input_ids_column,
        "loss_mask_column": loss_mask_column,
        "category_column": category_column,
        "dtype": dtype,
        "workers": workers,
        "ray_address": ray_address,
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "expert_parallel": expert_parallel,
        "force": force,
    }
    settings = load_config(ExtractConfig, config, options)
    from .extract.pipeline import run

    show(run(settings), as_json)


@app.command()
def regenerate(
    target: Annotated[str | None, typer.Option(help="Local directory or hub id of the target.")] = None,
    data: Annotated[list[str] | None, typer.Option(help=_PROMPTS_HELP)] = None,
    out: Annotated[str | None, typer.Option(help="Parquet file to write, or to add to.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows to read of all data together.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Column of conversations.")] = None,
    category_column: Annotated[str | None, typer.Option(help="Column of categories.")] = None,
    reasoning_effort: Annotated[str | None, typer.Option(help="Effort in the prompt of rows that name none.")] = None,
    date: Annotated[str | None, typer.Option(help="YYYY-MM-DD in the prompt of rows that name none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the target's own by default.")] = None,
    top_p: Annotated[float | None, typer.Option(help="The target's own by default.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is all; the target's own by default.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest prompt and answer together.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling as a whole.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type the target runs in: auto, float32, bfloat16.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="GPUs that share a layer.")] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(help="GPU groups, by layers.")] = None,
    expert_parallel: Annotated[
        bool | None, typer.Option("--expert-parallel", help="GPUs of --tensor-parallel hold whole experts.")
    ] = None,
    config: RunFile = None,
    as_json: AsJson = False,
) -> None:
    """Have the target answer the prompts of some data in vLLM, keeping the exact sampled ids; rerun resumes."""
    from .config import load_config
    from .extract.regenerate.config import RegenerateConfig

    options = {
        "target": target,
        "data": data or None,
        "out": out,
        "limit": limit,
        "messages_column": messages_column,
        "category_column": category_column,
        "reasoning_effort": reasoning_effort,
        "date": date,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "seed": seed,
        "dtype": dtype,
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "expert_parallel": expert_parallel,
    }
    settings = load_config(RegenerateConfig, config, options)
    from .extract.regenerate.pipeline import run

    show(run(settings), as_json)


@app.command()
def train(
    store: Annotated[list[str] | None, typer.Option(help="Feature store to train from; may be repeated.")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Passes over each store in an epoch; 1 each.")] = None,
    out: Annotated[str | None, typer.Option(help="Directory of the run; rerunning into it resumes.")] = None,
    view: Annotated[list[str] | None, typer.Option(help="Only the sequences of a view, or of several.")] = None,
    preset: Annotated[str | None, typer.Option(help="Recipe: eagle3, specdrift or eagle1.")] = None,
    boundaries: Annotated[str | None, typer.Option(help="Boundaries the draft reads, of those stored.")] = None,
    norm_output: Annotated[
        bool | None, typer.Option("--norm-output/--no-norm-output", help="Feed back the normed hidden state.")
    ] = None,
    fc_norm: Annotated[
        bool | None, typer.Option("--fc-norm/--no-fc-norm", help="Norm each auxiliary hidden state.")
    ] = None,
    norm_before_fc: Annotated[
        bool | None, typer.Option("--norm-before-fc/--no-norm-before-fc", help="Norm them as one, without --fc-norm.")
    ] = None,
    norm_before_residual: Annotated[
        bool | None,
        typer.Option("--norm-before-residual/--no-norm-before-residual", help="Residual from the normed state; vLLM."),
    ] = None,
    sliding_window: Annotated[int | None, typer.Option(help="Tokens that the draft reaches back.")] = None,
    train_embeddings: Annotated[
        bool | None, typer.Option("--train-embeddings/--no-train-embeddings", help="Embeddings of its own; vLLM.")
    ] = None,
    init_from: Annotated[str | None, typer.Option(help="Exported draft to start from.")] = None,
    loss: Annotated[str | None, typer.Option(help="cross_entropy, or one of those in docs/drafts.md.")] = None,
    ttt_steps: Annotated[int | None, typer.Option(help="Unrolled training steps, K.")] = None,
    draft_vocab_size: Annotated[int | None, typer.Option(help="Tokens the draft can propose.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Tokens of an optimizer step, on all devices.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens that fit on a device at a time.")] = None,
    devices: Annotated[int | None, typer.Option(help="Processes that share every step, a GPU each.")] = None,
    strategy: Annotated[str | None, typer.Option(help="auto, ddp or fsdp.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, 32-true or bf16-mixed.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the data's order and the first weights.")] = None,
    early_stopping: Annotated[int | None, typer.Option(help="Validations without progress until the run ends.")] = None,
    logger: Annotated[list[str] | None, typer.Option(help="tensorboard, csv, wandb, mlflow; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell memory and time of the run.")] = False,
    config: RunFile = None,
    as_json: AsJson = False,
) -> None:
    """Train a draft from a feature store; the same command rerun resumes."""
    with without_collector():
        import_torch()
        from .config import load_config
        from .train.config import TrainConfig

    options = {
        "store": store or None,
        "weights": weight or None,
        "out": out,
        "view": view or None,
        "preset": preset,
        "norm_output": norm_output,
        "fc_norm": fc_norm,
        "norm_before_fc": norm_before_fc,
        "norm_before_residual": norm_before_residual,
        "sliding_window": sliding_window,
        "train_embeddings": train_embeddings,
        "init_from": init_from,
        "boundaries": integers("--boundaries", boundaries),
        "loss": loss,
        "ttt_steps": ttt_steps,
        "draft_vocab_size": draft_vocab_size,
        "epochs": epochs,
        "max_steps": max_steps,
        "step_tokens": step_tokens,
        "batch_tokens": batch_tokens,
        "devices": devices,
        "strategy": strategy,
        "lr": lr,
        "precision": precision,
        "seed": seed,
        "early_stopping": early_stopping,
        "loggers": logger or None,
    }
    settings = load_config(TrainConfig, config, options)
    if dry_run:
        from .train.dry_run import forecast

        show(forecast(settings), as_json)
        return
    with without_collector(), without_text_metrics():
        from .train.pipeline import run

    show(run(settings), as_json)


@app.command()
def export(
    run: Annotated[str, typer.Option(help="Directory that `specx train --out` wrote.")],
    out: Annotated[str, typer.Option(help="Directory to write the draft to; must not exist.")],
    dtype: Annotated[ExportDtype, typer.Option(help="Type of the exported weights.")] = "bfloat16",
    format: Annotated[  # noqa: A002 - the option's name
        ExportFormat, typer.Option(help="eagle3, or speculators for vLLM; EAGLE-1 drafts go by eagle3 too.")
    ] = "eagle3",
    engine: Annotated[ExportEngine, typer.Option(help="What must serve it; both is whatever can.")] = "both",
    target: Annotated[str | None, typer.Option(help="Target that the speculators format names.")] = None,
    checkpoint: Annotated[
        CheckpointOption | None, typer.Option(help="last or best; by default best, where there is one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the draft as vLLM and SGLang load it, and check what was written."""
    from .train.export.write import export as export_draft

    show(export_draft(run, out, dtype, checkpoint, format=format, engine=engine, target=target), as_json)


@app.command()
def evaluate(
    draft: Annotated[str | None, typer.Option(help="Directory that `specx export` wrote.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Local directory of the target; without it, an estimate from --store.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Parquet or JSON-lines file of token ids, conversations, prompts or MT-Bench questions."),
    ] = None,
    store: Annotated[str | None, typer.Option(help="Feature store whose held-out sequences are the prompts.")] = None,
    split: Annotated[str | None, typer.Option(help="Sequences of the store: holdout or all.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, transformers or server.")] = None,
    url: Annotated[str | None, typer.Option(help="Server that drafts, for --engine server.")] = None,
    baseline_url: Annotated[str | None, typer.Option(help="Server of the same target that does not draft.")] = None,
    num_speculative_tokens: Annotated[int | None, typer.Option(help="Tokens drafted per verification.")] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Conversations decoded at a time; may be repeated.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens generated per turn.")] = None,
    limit: Annotated[int | None, typer.Option(help="Prompts to take of all data together.")] = None,
    reasoning_effort: Annotated[str | None, typer.Option(help="Effort in rendered prompts.")] = None,
    date: Annotated[str | None, typer.Option(help="YYYY-MM-DD in rendered prompts.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    out: Annotated[str | None, typer.Option(help="Directory of the results; rerunning does what is missing.")] = None,
    config: RunFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure a draft by real speculative decoding against the target alone, or estimate it from a store."""
    from .config import load_config
    from .train.evaluate.config import EvaluateConfig

    options = {
        "draft": draft,
        "target": target,
        "data": data or None,
        "store": store,
        "split": split,
        "engine": engine,
        "url": url,
        "baseline_url": baseline_url,
        "num_speculative_tokens": num_speculative_tokens,
        "batch_sizes": batch_size or None,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "limit": limit,
        "reasoning_effort": reasoning_effort,
        "date": date,
        "dtype": dtype,
        "out": out,
    }
    settings = load_config(EvaluateConfig, config, options)
    from .train.evaluate.pipeline import run

    show(run(settings), as_json)


@app.command("rope-check")
def rope_check(
    target: Annotated[str, typer.Option(help="Local directory of the target; its config is enough.")],
    draft: Annotated[str, typer.Option(help="Exported draft, or directory of a run.")],
    as_json: AsJson = False,
) -> None:
    """Compare the rotary angles of a draft, as trained and as vLLM and SGLang build them, with the target's."""
    from .train.export.rope_check import check_rope, require_equal

    check = check_rope(target, draft)
    show(check if as_json else check.shown(), as_json)
    require_equal(check, draft)


@app.command()
def report(
    paths: Annotated[list[str], typer.Argument(metavar="RUN|STORE...", help="Directories of runs, and stores.")],
    out: Annotated[str, typer.Option(help="HTML file to write; one that is there is replaced.")],
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="What `specx evaluate --json` printed; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw runs, one over the other, and stores in one HTML file that needs no network."""
    from .report.report import report as write_report

    show(write_report(paths, out, evaluation or ()), as_json)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"specx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
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
