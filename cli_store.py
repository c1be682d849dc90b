"""``specx store``: what looks into a feature store and works on it, no target and no draft needed."""

from typing import Annotated

import typer

from .options import CODECS, AsJson, RunFile, StorePath, TokensPerPart, integers, show
from .storage.codec_names import CodecName

app = typer.Typer(help="Look into a feature store, and work on it.", no_args_is_help=True)


@app.command()
def info(store: StorePath, as_json: AsJson = False) -> None:
    """Show what is in a store."""
    from .storage.ops.info import summary
    from .storage.store import FeatureStore

    show(summary(FeatureStore.open(store)), as_json)


@app.command()
def verify(
    store: StorePath,
    drop_bad: Annotated[
        bool, typer.Option("--drop-bad", help="Un-commit what is damaged; a rerun of extract fills exactly that.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a store against what was committed."""
    from .storage.ops.verify import drop_damaged, require_sound
    from .storage.ops.verify import verify as verify_store
    from .storage.store import FeatureStore

    opened = FeatureStore.open(store, tolerant=True)
    result = verify_store(opened)
    if drop_bad:
        drop_damaged(opened, result)
    show(result, as_json)
    require_sound(opened, result)


@app.command()
def select(
    store: StorePath,
    view: Annotated[str, typer.Option("--as", help="Name of the new view.")],
    of: Annotated[list[str] | None, typer.Option("--view", help="Choose from these views instead of all.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="Of one of these categories.")] = None,
    min_length: Annotated[int | None, typer.Option(help="Shortest sequence in tokens.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence in tokens; none is cut.")] = None,
    source: Annotated[str | None, typer.Option(help="Regular expression, found in the source's name.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many of the rest.")] = None,
    as_json: AsJson = False,
) -> None:
    """Name a subset of a store, for `train --view`; nothing is copied."""
    from .storage.ops.select import Filter
    from .storage.ops.select import select as select_view
    from .storage.store import FeatureStore

    wanted = Filter(
        categories=tuple(category) if category else None,
        min_length=min_length,
        max_length=max_length,
        source=source,
        limit=limit,
    )
    show(select_view(FeatureStore.open(store), view, wanted, views=tuple(of or ())), as_json)


@app.command()
def merge(
    sources: Annotated[list[str], typer.Argument(help="Stores of one target, in the same settings.")],
    into: Annotated[str, typer.Option(help="Store to add them to; made if there is none.")],
    link: Annotated[
        bool, typer.Option("--link", help="Share the files by hard links: no room is taken. One local disk only.")
    ] = False,
    tokens_per_part: TokensPerPart = 24_576,
    as_json: AsJson = False,
) -> None:
    """Add stores to another: what it has already is left out. Rerun after a stop."""
    from .storage.ops.merge import merge as merge_stores
    from .storage.store import FeatureStore

    opened = [FeatureStore.open(source) for source in sources]
    target = FeatureStore.create(into, opened[0].info)
    show(merge_stores(opened, target, link=link, tokens_per_part=tokens_per_part), as_json)


@app.command()
def prune(
    store: StorePath,
    into: Annotated[str, typer.Option(help="Store to write; made if there is none.")],
    boundaries: Annotated[str | None, typer.Option(help="Auxiliary hidden states to keep, such as 2,21.")] = None,
    codec: Annotated[CodecName | None, typer.Option(help="Of the new store; that of the old by default.")] = None,
    last_hidden: Annotated[
        bool | None, typer.Option("--last-hidden/--no-last-hidden", help="Keep what gives exact targets.")
    ] = None,
    tokens_per_part: TokensPerPart = 24_576,
    as_json: AsJson = False,
) -> None:
    """Write a smaller store of the same sequences, without the target. Rerun after a stop."""
    from .storage.ops.prune import prune as prune_store
    from .storage.ops.prune import pruned_info
    from .storage.store import FeatureStore

    opened = FeatureStore.open(store)
    kept = integers("--boundaries", boundaries)
    info = pruned_info(opened.info, boundaries=kept, codec=codec, last_hidden=last_hidden)
    show(prune_store(opened, FeatureStore.create(into, info), tokens_per_part=tokens_per_part), as_json)


@app.command()
def gc(
    store: StorePath,
    older_than: Annotated[float, typer.Option(help="Hours since the last change.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what killed runs left: parts and temporary files that no commit names."""
    from .storage.ops.gc import collect
    from .storage.store import FeatureStore

    show(collect(FeatureStore.open(store), older_than_s=3600 * older_than, dry_run=dry_run), as_json)


@app.command()
def plan(
    target: Annotated[str | None, typer.Option(help="Local directory or hub id of the target; no weights.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that are to be run through the target.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Sequences these tokens are in.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="As for extract, instead of --tokens.")] = None,
    store: Annotated[str | None, typer.Option(help="Where it would go, to see the free space there.")] = None,
    boundaries: Annotated[str | None, typer.Option(help="Auxiliary hidden states to keep, such as 2,12,21.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Logits kept per token.")] = None,
    codec: Annotated[str | None, typer.Option(help=f"{CODECS}.")] = None,
    last_hidden: Annotated[
        bool | None, typer.Option("--last-hidden/--no-last-hidden", help="Keep what gives exact targets.")
    ] = None,
    tokens_per_part: Annotated[int | None, typer.Option(help="Tokens committed at once.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence in tokens.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows to read of all data together.")] = None,
    date: Annotated[str | None, typer.Option(help="Day in the prompt, YYYY-MM-DD, of rows that name none.")] = None,
    tokens_per_s: Annotated[float | None, typer.Option(help="Measured by a run; gives the hours.")] = None,
    config: RunFile = None,
    as_json: AsJson = False,
) -> None:
    """Tell bytes, files and hours of an extraction before it runs."""
    from .config import load_config
    from .extract.plan import PlanConfig
    from .extract.plan import plan as plan_run

    options = {
        "target": target,
        "tokens": tokens,
        "sequences": sequences,
        "data": data or None,
        "store": store,
        "boundaries": integers("--boundaries", boundaries),
        "top_k": top_k,
        "codec": codec,
        "last_hidden": last_hidden,
        "tokens_per_part": tokens_per_part,
        "max_length": max_length,
        "limit": limit,
        "date": date,
        "tokens_per_s": tokens_per_s,
    }
    show(plan_run(load_config(PlanConfig, config, options)), as_json)
