"""Results on disk: one file of a row for each request, which appears with every pass that is complete.

A killed evaluation loses the pass in progress, as the time of half a pass says nothing; the rest is not measured again.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...storage.backends.durable import disk_errors, make_directory, temporary_name
from ..errors import TrainError
from .generations import Generation, Pass, Tally, tally_of
from .prompts import Prompt

REQUESTS_FILE = "requests.parquet"
RESULT_FILE = "result.json"
_KEY = b"specx"
"""Of the settings and the passes in the file's metadata."""

SCHEMA = pa.schema(
    [
        ("drafted", pa.bool_()),
        ("batch_size", pa.int32()),
        ("prompt", pa.int32()),
        ("name", pa.string()),
        ("category", pa.string()),
        ("turn", pa.int32()),
        ("prompt_length", pa.int32()),
        ("output_ids", pa.list_(pa.int32())),
        ("accepted", pa.list_(pa.int32())),
        ("verifications", pa.int32()),
        ("accepted_tokens", pa.int32()),
        ("seconds", pa.float64()),
    ]
)

PassName = tuple[bool, int]
"""Whether with the draft, and the batch size."""


class ResultsFile:
    """The passes of one evaluation, kept in a directory if it has one."""

    def __init__(self, out: str | None, settings: Mapping[str, Any], prompts: list[Prompt]) -> None:
        """Read what is there; raise TrainError if it was measured with other settings, naming the first."""
        self.passes: dict[PassName, Pass] = {}
        self._settings = json.loads(json.dumps(settings))
        self._prompts = prompts
        self._path = None if out is None else Path(out) / REQUESTS_FILE
        if self._path is not None and self._path.exists():
            self.passes = dict(self._read(self._path))

    def add(self, name: PassName, decoded: Pass) -> None:
        """Keep a pass."""
        self.passes[name] = decoded
        if self._path is None:
            return
        listed = [
            {
                "drafted": drafted,
                "batch_size": size,
                "seconds": each.seconds,
                "tally": each.tally and asdict(each.tally),
            }
            for (drafted, size), each in self.passes.items()
        ]
        metadata = {_KEY: json.dumps({"settings": self._settings, "passes": listed})}
        table = pa.Table.from_pylist(list(self._rows()), schema=SCHEMA.with_metadata(metadata))
        with disk_errors(self._path.parent):
            make_directory(self._path.parent)
            temporary = temporary_name(self._path)
            pq.write_table(table, temporary)
            temporary.rename(self._path)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``result.json``."""
        if self._path is None:
            return
        path = self._path.with_name(RESULT_FILE)
        with disk_errors(path):
            temporary = temporary_name(path)
            temporary.write_text(json.dumps({"settings": self._settings} | dict(summary), indent=1) + "\n")
            temporary.rename(path)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for (drafted, size), decoded in self.passes.items():
            for each in decoded.generations:
                prompt, tally = self._prompts[each.prompt], each.tally
                yield {
                    "drafted": drafted,
                    "batch_size": size,
                    "prompt": each.prompt,
                    "name": prompt.name,
                    "category": prompt.category,
                    "turn": each.turn,
                    "prompt_length": each.prompt_length,
                    "output_ids": each.output_ids,
                    "accepted": each.accepted,
                    "verifications": tally and tally.verifications,
                    "accepted_tokens": tally and tally.accepted,
                    "seconds": each.seconds,
                }

    def _read(self, path: Path) -> Iterator[tuple[PassName, Pass]]:
        try:
            table = pq.read_table(path)
            known = json.loads(table.schema.metadata[_KEY])
            rows = table.to_pylist()
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise TrainError(f"{path}: not the results of an evaluation. Choose another --out.") from error
        for key, wanted in self._settings.items():
            if (found := known["settings"].get(key)) != wanted:
                raise TrainError(
                    f"{path}: measured with {key} {found}, this run has {wanted}. Choose another --out, or the same "
                    f"{key}."
                )
        for each in known["passes"]:
            name = (each["drafted"], each["batch_size"])
            of_pass = [row for row in rows if (row["drafted"], row["batch_size"]) == name]
            tally = each["tally"] and Tally(**each["tally"])
            yield name, Pass(generations=list(map(_generation, of_pass)), seconds=each["seconds"], tally=tally)


def _generation(row: Mapping[str, Any]) -> Generation:
    tally = None
    if row["verifications"] is not None:
        per_request = row["accepted"]
        tally = (
            Tally(verifications=row["verifications"], accepted=row["accepted_tokens"], per_position=None)
            if per_request is None
            else tally_of(per_request)
        )
    return Generation(
        prompt=row["prompt"],
        turn=row["turn"],
        prompt_length=row["prompt_length"],
        output_ids=row["output_ids"],
        accepted=row["accepted"],
        tally=tally,
        seconds=row["seconds"],
    )
