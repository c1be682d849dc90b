"""``specx report``: pictures of stores, runs and evaluations in one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..storage.backends.durable import disk_errors, temporary_name
from ..storage.store import DATASET_FILE, FeatureStore
from .charts import Section, short_name
from .config import ReportConfig
from .errors import ReportError
from .evaluation import evaluation_section, read_evaluation
from .page import page
from .runs import read_run, run_section
from .store import store_section


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSummary:
    """What was written."""

    out: str
    bytes: int
    runs: int
    stores: int
    evaluations: int
    charts: int


def run(config: ReportConfig) -> ReportSummary:
    """Write the report that the settings describe."""
    return report(config.paths, config.out, config.evaluation)


def report(paths: Sequence[str], out: str | Path, evaluations: Sequence[Path] = ()) -> ReportSummary:
    """Write a report of runs and stores, in any order; runs are drawn over each other.

    An earlier report at ``out`` is replaced. Raises SpecxError if a path is neither, or holds nothing.
    """
    runs = [path for path in paths if is_run(path)]
    stores = [path for path in paths if path not in runs]
    sections: list[Section] = []
    if runs:
        sections.append(run_section([read_run(Path(path)) for path in runs]))
    if evaluations:
        sections.append(evaluation_section([(path.stem, read_evaluation(path)) for path in evaluations]))
    sections += [store_section(FeatureStore.open(path)) for path in stores]
    text = page(_title(runs, stores), f"specx {__version__}", sections)
    destination = Path(out).absolute()
    if destination.is_dir():
        raise ReportError(f"{destination}: is a directory. Name a file, such as report.html, as --out.")
    with disk_errors(destination.parent):
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(destination)
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(destination)
    return ReportSummary(
        out=str(destination),
        bytes=destination.stat().st_size,
        runs=len(runs),
        stores=len(stores),
        evaluations=len(evaluations),
        charts=sum(len(section.charts) for section in sections),
    )


def is_run(path: str) -> bool:
    """Return whether a path is a run's; raise ReportError if it is neither a run's nor may be a store's."""
    if "://" in path:
        return False
    directory = Path(path)
    if (directory / "run.json").exists():
        return True
    if not (directory / DATASET_FILE).exists():
        raise ReportError(
            f"{path}: neither a run (run.json) nor a feature store ({DATASET_FILE}). Give the --out of `specx train` "
            "or the --store of `specx extract`."
        )
    return False


def _title(runs: Sequence[str], stores: Sequence[str]) -> str:
    return f"Report of {', '.join(map(short_name, (*runs, *stores)))}"
