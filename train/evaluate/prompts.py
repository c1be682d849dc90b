"""Prompts to decode, from the rows that ``specx extract`` reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from ..errors import TrainError
from .config import EvaluateConfig

_COLUMNS = ("input_ids", "loss_mask")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What the target is asked to continue."""

    ids: list[int]
    category: str


def read_prompts(config: EvaluateConfig) -> list[Prompt]:
    """Return the prompts of the data, in order; raise TrainError if there are none, or on a bad file."""
    prompts: list[Prompt] = []
    for source in config.data:
        for number, row in enumerate(_rows(source)):
            if config.limit is not None and len(prompts) == config.limit:
                return prompts
            ids, mask = row["input_ids"], row["loss_mask"]
            if ids is None or mask is None:
                raise TrainError(f"{source}: row {number} has no {' and '.join(_COLUMNS)}. Leave it out.")
            length = mask.index(1) if 1 in mask else len(ids)
            if length:
                prompts.append(Prompt(ids=ids[:length], category=str(row.get("category") or "")))
    if not prompts:
        raise TrainError(f"{', '.join(config.data)}: no prompts, expected rows with {' and '.join(_COLUMNS)}.")
    return prompts


def _rows(source: str) -> Iterator[dict[str, Any]]:
    path = Path(source)
    if not path.is_file():
        raise TrainError(f"{source}: no such file. Give --data a Parquet or JSON-lines file.")
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else pyarrow.json.read_json(path)
    except (pa.ArrowException, OSError) as error:
        raise TrainError(f"{source}: not readable: {' '.join(str(error).split())[:160]}") from error
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise TrainError(
            f"{source}: no column {missing[0]} among {', '.join(table.column_names)}; "
            "evaluation reads rows of token ids."
        )
    wanted = [name for name in (*_COLUMNS, "category") if name in table.column_names]
    yield from table.select(wanted).to_pylist()
