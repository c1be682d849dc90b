"""Prompts to decode: from files of several shapes, and from a store.

input_ids, loss_mask   the prompt is what comes before the first supervised token
turns                  questions asked one after the other, the target's own answers between them (MT-Bench)
messages, conversations  a conversation; a last answer in it is left out
prompt, text           one user message, or a list of messages
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...hub import locate_target
from ...storage.catalog.sequence_id import unit_interval
from ...storage.reader import FeatureReader
from ...storage.store import FeatureStore
from ..errors import TrainError
from .chat_template import ChatTemplate, Message
from .config import EvaluateConfig

_NAMES = ("question_id", "id", "uuid", "primary_id")
_TEXTS = ("messages", "conversations", "turns", "prompt", "text")
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user"}
"""What older data sets call them."""
_EXPECTED = "input_ids and loss_mask, messages, conversations, turns, prompt or text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What the target is asked to continue, and what it is asked after that."""

    ids: list[int]
    category: str = ""
    name: str = ""
    messages: tuple[Message, ...] = ()
    """What ``ids`` were rendered from; empty where they were recorded."""
    later_turns: tuple[str, ...] = ()
    """What the user says once the target has answered, one after the other."""


def read_prompts(config: EvaluateConfig, template: ChatTemplate | None = None) -> list[Prompt]:
    """Return the prompts of data and store, in order.

    Without ``template`` the target's is loaded where rows are text. Raises TrainError if there are none, on a bad
    file, and for a row that cannot be rendered.
    """
    prompts: list[Prompt] = []
    for source in config.data:
        for number, row in enumerate(_rows(source)):
            if config.limit is not None and len(prompts) == config.limit:
                return prompts
            where = f"{source}: row {number}"
            name = str(next((row[key] for key in _NAMES if row.get(key) is not None), number))
            category = str(row.get("category") or "")
            if "input_ids" in row and "loss_mask" in row:
                ids = _recorded(row, where)
                if ids:
                    prompts.append(Prompt(ids=ids, category=category, name=name))
                continue
            if template is None:
                assert config.target is not None
                target = locate_target(config.target, weights=False)
                template = ChatTemplate(target, effort=config.reasoning_effort, date=config.date)
            messages, later = _spoken(row, where)
            prompts.append(
                Prompt(
                    ids=template.prompt(messages, where),
                    category=category,
                    name=name,
                    messages=messages,
                    later_turns=later,
                )
            )
    if config.store is not None:
        remaining = None if config.limit is None else config.limit - len(prompts)
        prompts += _stored(FeatureReader(FeatureStore.open(config.store)), config)[:remaining]
    if not prompts:
        raise TrainError(f"{', '.join(config.data)}: no prompts, expected rows with {_EXPECTED}.")
    return prompts


def chosen_sequences(reader: FeatureReader, config: EvaluateConfig) -> list[int]:
    """Return the numbers of the sequences of a store that are asked for; raise TrainError if there are none."""
    catalogue = reader.catalogue
    is_chosen = np.ones(len(catalogue), bool)
    if config.split == "holdout":
        is_chosen = unit_interval(catalogue.ids) < config.holdout_fraction
    found: list[int] = np.flatnonzero(is_chosen)[: config.limit].tolist()
    if not found:
        raise TrainError(
            f"{config.store}: none of its {len(catalogue)} sequences is held out at {config.holdout_fraction}. "
            "Give --split all."
        )
    return found


def _stored(reader: FeatureReader, config: EvaluateConfig) -> list[Prompt]:
    catalogue = reader.catalogue
    prompts = []
    for sequence in chosen_sequences(reader, config):
        length = int(catalogue.length[sequence])
        ids, mask = np.zeros(length, np.int32), np.zeros(length, np.uint8)
        reader.read(sequence, "input_ids", ids)
        reader.read(sequence, "loss_mask", mask)
        supervised = np.flatnonzero(mask)
        first = int(supervised[0]) if len(supervised) else length
        if first:
            name, category = bytes(catalogue.ids[sequence]).hex(), str(catalogue.category[sequence])
            prompts.append(Prompt(ids=ids[:first].tolist(), category=category, name=name))
    return prompts


def _recorded(row: dict[str, Any], where: str) -> list[int]:
    ids, mask = row["input_ids"], row["loss_mask"]
    if ids is None or mask is None:
        raise TrainError(f"{where} has no input_ids and loss_mask. Leave it out.")
    return list(ids[: mask.index(1) if 1 in mask else len(ids)])


def _spoken(row: dict[str, Any], where: str) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Return the messages that are answered first, and the user's later turns."""
    key = next((key for key in _TEXTS if row.get(key)), None)
    if key is None:
        raise TrainError(f"{where} has none of {', '.join(_TEXTS)}, expected {_EXPECTED}. Leave it out.")
    said = row[key]
    if isinstance(said, str):
        return ({"role": "user", "content": said},), ()
    if not isinstance(said, list):
        raise TrainError(f"{where}: {key} is of type {type(said).__name__}, expected text or a list. Leave it out.")
    if key == "turns":
        if not all(isinstance(each, str) for each in said):
            raise TrainError(f"{where}: turns are texts of the user, found something else. Leave it out.")
        return ({"role": "user", "content": said[0]},), tuple(said[1:])
    messages = tuple(_message(each, where) for each in said)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise TrainError(f"{where}: nothing before the answer. Leave it out.")
    return messages, ()


def _message(said: Any, where: str) -> Message:
    found = said if isinstance(said, dict) else {}
    role = found.get("role") or _ROLES.get(str(found.get("from")))
    content = found.get("content") if found.get("content") is not None else found.get("value")
    if not isinstance(role, str) or not isinstance(content, str):
        raise TrainError(f"{where}: a message needs role and content as text, found {str(said)[:80]}. Leave it out.")
    return {"role": role, "content": content}


def _rows(source: str) -> Iterator[dict[str, Any]]:
    path = Path(source)
    if not path.is_file():
        raise TrainError(f"{source}: no such file. Give --data a Parquet or JSON-lines file.")
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            wanted = [name for name in ("input_ids", "loss_mask", "category", *_NAMES) if name in table.column_names]
            if not {"input_ids", "loss_mask"} <= set(wanted):
                wanted += [name for name in _TEXTS if name in table.column_names]
            rows = table.select(wanted).to_pylist()
            columns = table.column_names
        else:
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
            columns = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TrainError(f"{source}: not readable: {' '.join(str(error).split())[:160]}") from error
    if not {"input_ids", "loss_mask"} <= set(columns) and not set(_TEXTS) & set(columns):
        raise TrainError(f"{source}: no column of {_EXPECTED} among {', '.join(columns)}.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise TrainError(f"{source}: row {number} is a {type(row).__name__}, expected an object. Leave it out.")
        yield row
