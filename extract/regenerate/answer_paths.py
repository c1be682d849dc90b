"""Where ``specx regenerate`` writes: the file of answers, and beside it its pieces and its rejects."""

from pathlib import Path


def pieces_directory(out: Path) -> Path:
    """Return where the answers lie until all are there."""
    return out.with_name(f"{out.name}.pieces")


def rejects_file(out: Path) -> Path:
    """Return where the rows lie that gave no prompt."""
    return out.with_suffix(".rejects.parquet")


def is_own(path: Path, out: Path) -> bool:
    """Whether a file is the file of answers or one of those beside it."""
    path, out = path.resolve(), out.resolve()
    return path in (out, rejects_file(out)) or pieces_directory(out) in path.parents
