"""The curves of a run, from what its CSV logger wrote."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from .errors import ReportError

Curve = Mapping[int, float]
"""Values by optimizer step."""

_SESSION = "from_step_"


def read_curves(logs: Path) -> dict[str, Curve]:
    """Return the curves by name, of all sessions of a run; what one logged behind the next one's start is left out.

    Raises ReportError if there is none.
    """
    curves: dict[str, dict[int, float]] = {}
    sessions = sorted(logs.glob(f"csv/{_SESSION}*/metrics.csv"), key=_first_step)
    for path in sessions:
        first = _first_step(path)
        for name, curve in curves.items():
            curves[name] = {step: value for step, value in curve.items() if step <= first}
        for name, step, value in _values(path):
            curves.setdefault(name, {})[step] = value
    if not any(curves.values()):
        raise ReportError(
            f"{logs / 'csv'}: no curves of a run here. Train with `--logger csv`, which is on unless loggers are named."
        )
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _first_step(path: Path) -> int:
    return int(path.parent.name.removeprefix(_SESSION))


def _values(path: Path) -> list[tuple[str, int, float]]:
    # A run that goes on may have written half of the last line.
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    try:
        found = [
            (name, int(row["step"]), float(value))
            for row in csv.DictReader(lines)
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path}: not what the CSV logger writes ({error}). Delete it to leave it out.") from error
    return [(name, step, value) for name, step, value in found if math.isfinite(value)]
