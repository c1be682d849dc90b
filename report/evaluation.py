"""The section of what ``specx evaluate --json`` printed, one or several drafts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .charts import Axis, Chart, Section, Trace, shown
from .errors import ReportError

_LENGTH = Axis(title="tokens per verification", starts_at_zero=True)


class Row(BaseModel):
    """One batch size and category."""

    model_config = ConfigDict(frozen=True)

    batch_size: int
    category: str
    requests: int
    baseline_tokens_per_s: float | None
    tokens_per_s: float
    acceptance_length: float | None
    delta_percent: float | None


class Evaluation(BaseModel):
    """What one evaluation came to; further keys are left alone."""

    model_config = ConfigDict(frozen=True)

    acceptance_length: float
    per_position: tuple[float, ...]
    by_category: dict[str, float]
    by_context: dict[str, float]
    verifications: int
    # An estimate from a store decodes nothing, and has none of these.
    lossless: bool | None = None
    tokens_per_s: float | None = None
    baseline_tokens_per_s: float | None = None
    requests: int | None = None
    table: tuple[Row, ...] = ()


def read_evaluation(path: Path) -> Evaluation:
    """Read the JSON, or the last line of a file that has others before it; raise ReportError if there is none."""
    try:
        lines = path.read_text().strip().splitlines()
        content: Any = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else json.loads("\n".join(lines))
        return Evaluation.model_validate(content)
    except (OSError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ReportError(f"{path}: not what `specx evaluate --json` prints ({reason}). Give its output.") from error


def evaluation_section(named: Sequence[tuple[str, Evaluation]]) -> Section:
    """Draw evaluations, each in a colour of its own where there are several."""
    heads = ("Acceptance length", "Tokens a second", "Without draft", "Speed-up", "Output", "Requests")
    first = named[0][1]
    return Section(
        title="Speculative decoding",
        lead="As measured by specx evaluate; the bonus token is counted.",
        figures=dict(zip(heads, _cells(first), strict=True)) if len(named) == 1 else {},
        table=_by_batch_size(first) if len(named) == 1 else _compared(heads, named),
        charts=[
            _chart(
                named,
                "Accepted by position",
                [{str(k + 1): share for k, share in enumerate(each.per_position)} for _, each in named],
                x=Axis(title="drafted token", kind="category"),
                y=Axis(title="verifications that accept it", format=".0%", starts_at_zero=True),
            ),
            _chart(
                named,
                "Acceptance length by category",
                [{shown(name): length for name, length in each.by_category.items()} for _, each in named],
                x=Axis(title="category", kind="category"),
                y=_LENGTH,
            ),
            _chart(
                named,
                "Acceptance length by context",
                [each.by_context for _, each in named],
                x=Axis(title="tokens before the verification", kind="category"),
                y=_LENGTH,
            ),
        ],
    )


def _compared(heads: Sequence[str], named: Sequence[tuple[str, Evaluation]]) -> list[list[str]]:
    return [["Evaluation", *heads], *([name, *_cells(evaluation)] for name, evaluation in named)]


def _by_batch_size(evaluation: Evaluation) -> list[list[str]]:
    if not evaluation.table:
        return []
    head = ["Category", "Batch size", "Requests", "Without draft", "Tokens a second", "Acceptance length", "Difference"]
    return [
        head,
        *(
            [
                row.category or "(none)",
                str(row.batch_size),
                f"{row.requests:,}",
                _text(row.baseline_tokens_per_s, ",.0f"),
                _text(row.tokens_per_s, ",.0f"),
                _text(row.acceptance_length, ".3f"),
                _text(row.delta_percent, "+.0f", " %"),
            ]
            for row in evaluation.table
        ),
    ]


def _cells(evaluation: Evaluation) -> list[str]:
    output = {True: "the target's own", False: "differs", None: "not compared"}[evaluation.lossless]
    rate, alone = evaluation.tokens_per_s, evaluation.baseline_tokens_per_s
    return [
        f"{evaluation.acceptance_length:.3f}",
        _text(rate, ",.0f"),
        _text(alone, ",.0f"),
        _text(rate / alone if rate and alone else None, ".2f", " times"),
        "estimated" if rate is None else output,
        _text(evaluation.requests, ","),
    ]


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _chart(
    named: Sequence[tuple[str, Evaluation]], title: str, values: Sequence[dict[str, float]], *, x: Axis, y: Axis
) -> Chart:
    traces = [
        Trace(name=name, x=list(each), y=list(each.values()), kind="bars", colour=colour)
        for colour, ((name, _), each) in enumerate(zip(named, values, strict=True))
    ]
    return Chart(title=title, x=x, y=y, traces=traces)
