"""The rows that did not become sequences, as Parquet for the user to read."""

import uuid

import pyarrow as pa
import pyarrow.parquet as pq

from .files import disk_errors, temporary_name
from .schema import Reject
from .store import REJECTS_DIRECTORY, FeatureStore

_SCHEMA = pa.schema([("source", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())])


def read_rejects(store: FeatureStore) -> list[Reject]:
    """Return every rejected row, each once, whichever runs met it."""
    found: dict[Reject, None] = {}
    for path in sorted((store.root / REJECTS_DIRECTORY).glob("r*.parquet")):
        found |= dict.fromkeys(Reject(**row) for row in pq.read_table(path, schema=_SCHEMA).to_pylist())
    return list(found)


def write_rejects(store: FeatureStore, rejects: list[Reject]) -> None:
    """Add the rows that are not there yet, in a file of their own."""
    known = set(read_rejects(store))
    fresh = [reject.model_dump() for reject in rejects if reject not in known]
    if not fresh:
        return
    path = store.root / REJECTS_DIRECTORY / f"r{uuid.uuid4().hex}.parquet"
    with disk_errors(store.root):
        path.parent.mkdir(exist_ok=True)
        temporary = temporary_name(path)
        pq.write_table(pa.Table.from_pylist(fresh, schema=_SCHEMA), temporary)
        temporary.rename(path)
