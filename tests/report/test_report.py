"""A report has the numbers of what it is of, and nothing but text in it comes from the data."""

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from specx.report.charts import Axis, Chart, Section, Trace
from specx.report.errors import ReportError
from specx.report.evaluation import read_evaluation
from specx.report.page import page
from specx.report.report import report
from specx.report.runs import read_run
from specx.train.evaluate.config import EvaluateConfig
from specx.train.evaluate.pipeline import run as evaluate

Specx = Callable[..., subprocess.CompletedProcess[str]]
Figure = dict[str, Any]


def charts(path: Path) -> dict[str, Figure]:
    """Return plotly's figures by the titles that the page gives them."""
    text = path.read_text()
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, re.DOTALL)
    assert found
    figures = json.loads(found[1])
    titles = re.findall(r'id="(chart\d+)" role="img" aria-label="([^"]*)"', text)
    assert [name for name, _ in titles] == list(figures)
    return {title: figures[name] for name, title in titles}


@pytest.mark.parametrize("name", ["store", "run", "all"])
def test_every_chart_is_one_that_plotly_takes(reports: dict[str, Path], name: str) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for figure in charts(reports[name]).values():
        graph_objects.Figure(figure)
        assert all(len(trace["x"]) == len(trace["y"]) > 0 for trace in figure["data"])


def test_a_report_of_a_store_tells_what_is_in_it(reports: dict[str, Path]) -> None:
    found = charts(reports["store"])
    assert list(found) == [
        "Lengths of sequences",
        "Categories",
        "Size of hidden states by position",
        "Bytes by array",
        "Probability held by the top k",
        "Coverage by a draft vocabulary",
    ]
    assert sum(found["Lengths of sequences"]["data"][0]["y"]) == 120
    assert sum(found["Categories"]["data"][0]["x"]) == pytest.approx(1)
    arrays = found["Bytes by array"]["data"][0]
    assert arrays["y"][0] == "aux_hidden"
    coverage = found["Coverage by a draft vocabulary"]["data"][0]
    assert (coverage["x"][-1], coverage["y"][-1]) == (2048, 1.0)


def test_a_report_of_a_run_has_the_curves_that_were_logged(reports: dict[str, Path], trained_run: Path) -> None:
    found = charts(reports["run"])
    training, held_out = found["Loss"]["data"]
    with (trained_run / "logs" / "csv" / "from_step_0000000" / "metrics.csv").open() as lines:
        curve = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]}
    assert len(curve) == 6
    assert training["x"] == list(curve)
    assert training["y"] == pytest.approx(list(curve.values()), rel=1e-4)
    assert (training["name"], held_out["name"], held_out["mode"]) == ("training", "held out", "lines+markers")
    for title in ("Throughput", "Waiting for data"):
        assert found[title]["data"][0]["x"] == list(curve)
    assert all(speed > 0 for speed in found["Throughput"]["data"][0]["y"])
    assert all(0 <= share <= 1 for share in found["Waiting for data"]["data"][0]["y"])
    assert len(found["Accuracy by unrolled step"]["data"][0]["y"]) == 4
    result = json.loads((trained_run / "result.json").read_text())
    assert f"<dd>{result['acceptance_length']:.3f}</dd>" in reports["run"].read_text()


def test_several_runs_lie_over_each_other_and_their_differing_settings_in_a_table(reports: dict[str, Path]) -> None:
    lengths = charts(reports["all"])["Acceptance length"]["data"]
    assert {trace["name"] for trace in lengths} >= {"eagle3, training", "lk, training"}
    assert {trace["meta"]["colour"] for trace in lengths} == {0, 1}
    text = reports["all"].read_text()
    (head,) = re.findall(r"<tr><th>Run</th>.*?</tr>", text)
    assert "<th>loss</th>" in head
    assert "<th>seed</th>" not in head
    assert "Of different losses (cross_entropy, lk_lambda): not to be compared." in text


def test_an_evaluation_is_drawn_by_position_category_and_context(reports: dict[str, Path]) -> None:
    found = charts(reports["all"])
    assert found["Accepted by position"]["data"][0]["y"] == [0.88, 0.61, 0.45]
    assert found["Acceptance length by context"]["data"][0]["x"] == ["0-128", "128-512"]
    # A tag would be carried out.
    category = found["Acceptance length by category"]["data"][0]["x"][1]
    assert category == "&lt;b&gt;speech&lt;/b&gt; with a name t…"
    assert "<dt>Speed-up</dt><dd>1.41 times</dd>" in reports["all"].read_text()


def test_one_evaluation_has_its_table_by_batch_size(reports: dict[str, Path]) -> None:
    text = reports["all"].read_text()
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr><td>all</td>.*?</tr>", text)]
    assert cells == [
        ["all", "8", "40", "184", "259", "2.940", "+41 %"],
        ["all", "64", "40", "-", "1,259", "-", "-"],
    ]


def test_an_estimate_is_drawn_beside_a_measurement(
    tmp_path: Path, tiny_store: Path, exported_draft: Path, trained_run: Path, evaluation: Path
) -> None:
    pytest.importorskip("plotly")
    estimated = evaluate(EvaluateConfig(draft=str(exported_draft), store=str(tiny_store), split="all", limit=10))
    (tmp_path / "estimate.json").write_text(json.dumps(asdict(estimated)))
    report([str(trained_run)], tmp_path / "report.html", [evaluation, tmp_path / "estimate.json"])
    text = (tmp_path / "report.html").read_text()
    cells = re.findall(r"<td>(.*?)</td>", re.findall(r"<tr><td>estimate</td>.*?</tr>", text)[0])
    assert cells == ["estimate", f"{estimated.acceptance_length:.3f}", "-", "-", "-", "estimated", "-"]


def test_a_run_that_goes_on_is_drawn_as_far_as_it_is(tmp_path: Path, trained_run: Path) -> None:
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    (run / "result.json").unlink()
    report([str(run)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<dd>not complete</dd>" in text
    assert "<dt>Steps</dt><dd>60</dd>" in text
    assert read_run(run).result is None


def test_names_from_the_data_cannot_end_the_script_or_open_a_tag() -> None:
    pytest.importorskip("plotly")
    name = "</script><img src=x onerror=alert(1)>"
    axis = Axis(title=name)
    chart = Chart(title=name, note=name, x=axis, y=axis, traces=[Trace(name=name, x=[1], y=[2])])
    section = Section(title=name, lead=name, figures={name: name}, table=[[name], [name]], charts=[chart])
    text = page(name, name, [section])
    assert name not in text
    assert "<img" not in text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path, trained_run: Path) -> None:
    paths = [str(shutil.copytree(trained_run, tmp_path / parent / "run")) for parent in ("a", "b")]
    report(paths, tmp_path / "report.html")
    assert "<td>a/run</td>" in (tmp_path / "report.html").read_text()


def test_an_earlier_report_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path, trained_run: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    report([str(trained_run)], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_what_is_neither_a_run_nor_a_store_is_refused_in_a_line(
    tmp_path: Path, trained_run: Path, evaluation: Path
) -> None:
    with pytest.raises(ReportError, match=r"neither a run .* nor a feature store"):
        report([str(tmp_path)], tmp_path / "report.html")
    with pytest.raises(ReportError, match="is a directory"):
        report([str(trained_run)], tmp_path)
    (tmp_path / "wrong.json").write_text('{"acceptance_length": 3}')
    with pytest.raises(ReportError, match=r"wrong\.json: not what `specx evaluate --json` prints"):
        read_evaluation(tmp_path / "wrong.json")
    assert read_evaluation(evaluation).requests == 40


def test_the_command_writes_a_report_of_everything(
    specx: Specx, tmp_path: Path, tiny_store: Path, trained_run: Path, evaluation: Path
) -> None:
    pytest.importorskip("plotly")
    out = tmp_path / "report.html"
    result = specx("report", trained_run, tiny_store, "--evaluation", evaluation, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary == {
        "out": str(out), "bytes": out.stat().st_size, "runs": 1, "stores": 1, "evaluations": 1, "charts": 17,
    }  # fmt: skip
    assert summary["bytes"] < 2_500_000
    refused = specx("report", tmp_path, "--out", out)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"specx: {tmp_path}: neither a run")
