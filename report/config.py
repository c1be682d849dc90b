"""Settings of ``specx report``."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..config import Option, RunConfig


class ReportConfig(RunConfig):
    """What to draw, and where to."""

    paths: Annotated[tuple[str, ...], Option(is_argument=True, metavar="RUN|STORE..."), Field(min_length=1)]
    """Directories of runs, and feature stores."""
    out: str
    """HTML file to write; an existing one is replaced."""
    evaluation: tuple[Path, ...] = ()
    """File with the output of `specx evaluate --json`. May be repeated."""
