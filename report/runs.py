"""The section of training runs, one over the other."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .charts import Axis, Chart, Section, Trace, count
from .curves import Curve, read_curves

_POINTS = 400
"""Of a line, at most: more than a screen shows."""
_STEPS = Axis(title="optimizer step", starts_at_zero=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run's directory tells of it."""

    name: str
    parent: str
    """Name of the directory it lies in, which tells two of the same name apart."""
    settings: dict[str, Any]
    curves: dict[str, Curve]
    result: dict[str, Any] | None
    """None until the run is complete."""

    def last(self, *names: str) -> float | None:
        """Return the last value of the first curve there is."""
        for name in names:
            if curve := self.curves.get(name):
                return curve[max(curve)]
        return None


def read_run(path: Path) -> Run:
    """Read a run, complete or not; raise SpecxError if it is none."""
    from ..train.loop.run_directory import RunDirectory

    directory = RunDirectory(path)
    settings = directory.record().settings
    result = json.loads(directory.result.read_text()) if directory.result.exists() else None
    return Run(
        name=directory.path.name,
        parent=directory.path.parent.name,
        settings=settings,
        curves=read_curves(directory.logs),
        result=result,
    )


def run_section(runs: Sequence[Run]) -> Section:
    """Draw runs, each in a colour of its own where there are several."""
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=f"{run.parent}/{run.name}") for run in runs]
    first = runs[0]
    # A family without a choice of losses has one of its own.
    losses = {run.settings.get("loss", f"that of {run.settings['method']}") for run in runs}
    note = "" if len(losses) == 1 else f"Of different losses ({', '.join(sorted(losses))}): not to be compared."
    charts = [
        _curves(runs, "Loss", "loss", Axis(title="loss"), note),
        _curves(runs, "Acceptance length", "acceptance_length", Axis(title="tokens per verification"), _LENGTH_NOTE),
        _curves(runs, "Accuracy", "accuracy", Axis(title="draft's best is target's best", format=".0%"), _STEP_0),
        _by_step(runs),
        _plain(runs, "Learning rate", "lr", Axis(title="learning rate", format="~e", starts_at_zero=True)),
        _plain(runs, "Gradient norm", "gradient_norm", Axis(title="norm before clipping", kind="log")),
        _plain(runs, "Throughput", "tokens_per_s", Axis(title="tokens a second", format="~s", starts_at_zero=True)),
        _plain(runs, "Waiting for data", "data_wait_fraction", Axis(title="share of the time", format=".1%"), _WAIT),
    ]
    title = f"Run {first.name}" if len(runs) == 1 else f"{len(runs)} runs"
    return Section(
        title=title,
        lead=_lead(first) if len(runs) == 1 else "Settings in which they differ are in the table.",
        figures=dict(_facts(first)) if len(runs) == 1 else {},
        table=_table(runs) if len(runs) > 1 else (),
        charts=[chart for chart in charts if chart.traces],
    )


_LENGTH_NOTE = "Simulated: the bonus token, and every drafted token up to the first miss."
_STEP_0 = "Of the first drafted token."
_WAIT = "Of the first process, between two logged steps."


def _lead(run: Run) -> str:
    chosen = ("preset", "loss", "ttt_steps", "draft_vocab_size", "lr", "step_tokens", "batch_tokens", "seed")
    return ", ".join(f"{key} {run.settings[key]}" for key in chosen if run.settings.get(key) is not None)


_FACTS: tuple[tuple[str, str, tuple[str, ...], Callable[[float], str]], ...] = (
    ("Acceptance length", "acceptance_length", ("val/acceptance_length", "train/acceptance_length"), "{:.3f}".format),
    ("Accuracy", "accuracy", ("val/accuracy", "train/accuracy"), "{:.1%}".format),
    ("Loss", "loss", ("val/loss", "train/loss"), "{:.4f}".format),
    ("Steps", "steps", (), count),
    ("Tokens", "tokens", (), count),
    ("Tokens a second", "tokens_per_s", ("tokens_per_s",), count),
    ("Waiting for data", "data_wait_fraction", ("data_wait_fraction",), "{:.1%}".format),
)
"""Label, key of ``result.json``, curves that tell it of a run that is not complete, and how it is shown."""


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = []
    for label, key, names, text in _FACTS:
        value = run.result[key] if run.result else run.last(*names)
        if value is None and key == "steps":
            value = max(max(curve) for curve in run.curves.values() if curve)
        facts.append((label, "-" if value is None else text(value)))
    return [*facts, ("State", "complete" if run.result else "not complete")]


def _table(runs: Sequence[Run]) -> list[list[str]]:
    keys = {key for run in runs for key in run.settings}
    differing = sorted(key for key in keys if len({json.dumps(run.settings.get(key)) for run in runs}) > 1)
    facts = [_facts(run) for run in runs]
    head = ["Run", *(label for label, _ in facts[0]), *differing]
    return [
        head,
        *(
            [run.name, *(value for _, value in known), *(_setting(run.settings.get(key)) for key in differing)]
            for run, known in zip(runs, facts, strict=True)
        ),
    ]


def _setting(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _curves(runs: Sequence[Run], title: str, name: str, y: Axis, note: str = "") -> Chart:
    traces = []
    for colour, run in enumerate(runs):
        held_out = run.curves.get(f"val/{name}", {})
        of = "" if len(runs) == 1 else f"{run.name}, "
        traces.append(_trace(f"{of}training", run.curves.get(f"train/{name}", {}), colour, is_faint=bool(held_out)))
        traces.append(_trace(f"{of}held out", held_out, colour, kind="points"))
    return Chart(title=title, note=note, x=_STEPS, y=y, traces=[trace for trace in traces if trace.x])


def _plain(runs: Sequence[Run], title: str, name: str, y: Axis, note: str = "") -> Chart:
    traces = [_trace(run.name, run.curves.get(name, {}), colour) for colour, run in enumerate(runs)]
    return Chart(title=title, note=note, x=_STEPS, y=y, traces=[trace for trace in traces if trace.x])


def _trace(name: str, curve: Curve, colour: int, **look: Any) -> Trace:
    stride = -(-len(curve) // _POINTS) or 1
    # The last point is what one looks for.
    points = [*curve.items()][::-1][::stride][::-1]
    return Trace(
        name=name, x=[step for step, _ in points], y=[_short(value) for _, value in points], colour=colour, **look
    )


def _by_step(runs: Sequence[Run]) -> Chart:
    """Return the accuracy of each unrolled step at the end."""
    traces = []
    for colour, run in enumerate(runs):
        split = "val" if "val/accuracy_0" in run.curves else "train"
        values: list[float] = []
        while (value := run.last(f"{split}/accuracy_{len(values)}")) is not None:
            values.append(_short(value))
        name = run.name if len(runs) > 1 else "held out" if split == "val" else "training"
        traces.append(Trace(name=name, x=[str(k) for k in range(len(values))], y=values, kind="bars", colour=colour))
    return Chart(
        title="Accuracy by unrolled step",
        note="At the end; step k feeds on the draft's own states k times.",
        x=Axis(title="unrolled step", kind="category"),
        y=Axis(title="draft's best is target's best", format=".0%"),
        traces=[trace for trace in traces if trace.x],
    )


def _short(value: float) -> float:
    return float(f"{value:.5g}")
