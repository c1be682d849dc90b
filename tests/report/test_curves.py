"""Curves are those that the run's checkpoints stand for."""

from pathlib import Path

import pytest

from specx.report.curves import read_curves
from specx.report.errors import ReportError


def write(logs: Path, first: int, text: str) -> None:
    path = logs / "csv" / f"from_step_{first:07d}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_a_later_session_takes_the_place_of_what_an_earlier_one_logged_behind_its_start(tmp_path: Path) -> None:
    write(tmp_path, 0, "step,train/loss,val/loss\n1,5.0,\n2,4.0,\n3,3.0,\n3,,3.5\n4,2.5,\n5,2.25,\n")
    write(tmp_path, 3, "step,train/loss,val/loss\n4,2.0,\n")
    assert read_curves(tmp_path) == {"train/loss": {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}, "val/loss": {3: 3.5}}


def test_half_a_line_and_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 0, "step,train/loss,gradient_norm\n1,5.0,inf\n2,4.0,1.0\n3,3.")
    assert read_curves(tmp_path) == {"train/loss": {1: 5.0, 2: 4.0}, "gradient_norm": {2: 1.0}}


def test_no_curves_are_an_error_that_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="Train with `--logger csv`"):
        read_curves(tmp_path)
    write(tmp_path, 0, "step,train/loss\n1,high\n")
    with pytest.raises(ReportError, match=r"metrics\.csv: not what the CSV logger writes"):
        read_curves(tmp_path)
