"""The table that a comparison ends with.

A ratio is of one round, and the one that is shown the median of the rounds'; more than 1 is more of what is measured.
"""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

Values = list[float]
PEERS = ("speculators", "specforge", "modelopt", "automodel")


def ratios(ours: Values, theirs: Values) -> Values:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def shown(values: Values, digits: int = 2) -> str:
    """Return the median, with the least and the largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def column(rows: list[dict[str, float]], key: str) -> Values:
    return [row[key] for row in rows]


def fastest(seconds: dict[str, list[dict[str, float]]], name: str) -> list[dict[str, float]]:
    """Return the rounds of the way of one project that took the processor the least."""
    ways = [rows for key, rows in seconds.items() if key.partition(" ")[0] == name]
    return min(ways, key=lambda rows: statistics.median(column(rows, "cpu_s")))


def step_table(step: dict[str, Any]) -> Table:
    table = Table(title="Training step: milliseconds, and ours over theirs", title_justify="left")
    for each in ("case", "project", "ms", "processor ms", "ours / theirs", "of processor time"):
        table.add_column(each)
    for case, seconds in step.items():
        ours = seconds["ours plain"]
        for key in sorted(seconds):
            rows = seconds[key]
            table.add_row(
                case,
                key,
                f"{statistics.median(column(rows, 'seconds')) * 1000:.0f}",
                f"{statistics.median(column(rows, 'cpu_s')) * 1000:.0f}",
                *(shown(ratios(column(ours, each), column(rows, each))) for each in ("seconds", "cpu_s")),
            )
        table.add_section()
    return table


def start_table(start: dict[str, Any]) -> Table:
    table = Table(
        title="From the training command to the end of its first step; ours over theirs", title_justify="left"
    )
    for each in ("sequences", "project", "s", "processor s", "ours / theirs", "of processor time"):
        table.add_column(each)
    for count, seconds in start.items():
        for key, rows in seconds.items():
            table.add_row(
                count,
                key,
                *(f"{statistics.median(column(rows, each)):.2f}" for each in ("seconds", "cpu_s")),
                *(shown(ratios(column(seconds["ours"], each), column(rows, each))) for each in ("seconds", "cpu_s")),
            )
        table.add_section()
    return table


def store_table(store: dict[str, Any]) -> Table:
    table = Table(title="Store at hidden size 2880; lossless over theirs", title_justify="left")
    for each in ("project", "bytes a token", "error", "ours / theirs", "written, processor s"):
        table.add_column(each)
    lossless = store["ours lossless"]
    for key, found in store.items():
        table.add_row(
            key,
            f"{found['bytes_per_token']:.0f}",
            f"{found['error']:.4f}",
            f"{lossless['bytes_per_token'] / found['bytes_per_token']:.3f}",
            f"{sum(column(found['written'], 'cpu_s')):.1f}",
        )
    return table


def read_table(store: dict[str, Any]) -> Table:
    table = Table(title="The same, read in random order to batches; ours over theirs", title_justify="left")
    for each in ("project", "tokens/s", "processes", "tokens/processor s", "lossless / theirs", "none / theirs",
                 "first batch, s", "lossless / theirs"):  # fmt: skip
        table.add_column(each)
    lossless = store["ours lossless"]
    for key, found in store.items():
        table.add_row(
            key,
            shown(found["tokens_per_s"], 0),
            str(found["workers"]),
            "" if found["workers"] else shown(found["tokens_per_cpu_s"], 0),
            *(read_ratio(found, codec) for codec in ("lossless", "none")),
            f"{statistics.median(column(found['first_batch'], 'seconds')):.3f}",
            shown(ratios(column(lossless["first_batch"], "seconds"), column(found["first_batch"], "seconds"))),
        )
    return table


def read_ratio(found: dict[str, Any], codec: str) -> str:
    """Return what a store of ours is read at over one of a peer, of the rounds in which they took turns."""
    ours = found["beside"].get(f"ours {codec}")
    return shown(ratios(ours, found["tokens_per_s"])) if ours else ""


def goals_table(result: dict[str, Any]) -> Table:
    """Show the ratios that we hold ourselves to, against whichever peer is best."""
    table = Table(title="Against the best of the peers", title_justify="left")
    for each in ("what", "wanted", "found", "of processor time", "best peer"):
        table.add_column(each)
    for case, limit in (
        ("float32 full", 0.85),
        ("float32 half", 0.60),
        ("bfloat16 full", None),
        ("bfloat16 half", None),
    ):
        if seconds := result.get("step", {}).get(case):
            best = best_peer(
                {name: fastest(seconds, name) for name in PEERS if any(k.startswith(name) for k in seconds)}
            )
            rows = fastest(seconds, best)
            for way, wanted in (("plain", f"<= {limit}" if limit else ""), ("floor", "")):
                ours = seconds[f"ours {way}"]
                table.add_row(
                    f"step, {case}" if way == "plain" else f"floor of all rows, {case}",
                    wanted,
                    *(shown(ratios(column(ours, each), column(rows, each))) for each in ("seconds", "cpu_s")),
                    best,
                )
    for count, seconds in result.get("start", {}).items():
        best = min((name for name in seconds if name != "ours"), key=lambda name: median_seconds(seconds[name]))
        table.add_row(
            f"start to end of first step, {count} sequences",
            "<= 0.5",
            *(
                shown(ratios(column(seconds["ours"], each), column(seconds[best], each)))
                for each in ("seconds", "cpu_s")
            ),
            best,
        )
        floor = [each / median_seconds(seconds[best]) for each in result["start_floor"]]
        table.add_row("floor: start to torch and an optimizer", "", shown(floor), "", best)
    if store := result.get("store"):
        peers = {key: found for key, found in store.items() if not key.startswith("ours")}
        bf16 = {key: found for key, found in peers.items() if "fp8" not in key}
        least = min(bf16, key=lambda key: bf16[key]["bytes_per_token"])
        for codec, limit in (("lossless", 0.75), ("int8", 0.47)):
            ratio = store[f"ours {codec}"]["bytes_per_token"] / bf16[least]["bytes_per_token"]
            table.add_row(f"bytes a token, {codec}", f"<= {limit}", f"{ratio:.3f}", "", least)
        if fp8 := store.get("speculators fp8"):
            int8 = store["ours int8"]
            table.add_row("bytes a token, int8 over fp8", "< 1",
                          f"{int8['bytes_per_token'] / fp8['bytes_per_token']:.3f}", "", "speculators fp8")  # fmt: skip
            table.add_row("error, int8 over fp8", "< 1", f"{int8['error'] / fp8['error']:.3f}", "", "speculators fp8")
        best = max(bf16, key=lambda key: statistics.median(bf16[key]["tokens_per_s"]))
        for codec in ("lossless", "none"):
            table.add_row(f"tokens read a second, {codec}", ">= 2.5", read_ratio(bf16[best], codec), "", best)
        first = {key: found["first_batch"] for key, found in bf16.items()}
        best = min(first, key=lambda key: statistics.median(column(first[key], "seconds")))
        ours = store["ours lossless"]["first_batch"]
        table.add_row(
            "store to first batch, lossless",
            "",
            *(shown(ratios(column(ours, each), column(first[best], each))) for each in ("seconds", "cpu_s")),
            best,
        )
    return table


def median_seconds(rows: list[dict[str, float]]) -> float:
    return statistics.median(column(rows, "seconds"))


def best_peer(seconds: dict[str, list[dict[str, float]]]) -> str:
    return min(seconds, key=lambda name: statistics.median(column(seconds[name], "cpu_s")))


def print_report(result: dict[str, Any]) -> None:
    console = Console(width=200)
    console.print(f"{result['processor']}, {result['cores']} cores, load {result['load'][0]:.1f} at the start")
    for name, found in result["versions"].items():
        console.print(f"{name:12} {found['version']:10} torch {found['torch']}, transformers {found['transformers']}")
    for name, error in result["missing"].items():
        console.print(f"{name:12} none: {error}", markup=False)
    for name, table in (("step", step_table), ("start", start_table), ("store", store_table), ("store", read_table)):
        if name in result:
            console.print(table(result[name]))
    console.print(goals_table(result))
