"""What stands in ``dataset.json``, in a commit record and in each array.

The text of these files comes from outside the process, so the records are
validated by pydantic: unknown keys and wrong types are refused by name.

Shapes: N tokens of a part, S sequences of a part, L boundaries, H hidden size,
K logits kept per token.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from crc32c import crc32c
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .codec_names import CodecName
from .errors import StoreCorruptError, StoreError, StoreMismatchError

FORMAT_VERSION = 1
"""Version of the layout on disk; a reader refuses what is newer."""

Array = npt.NDArray[Any]

_BFLOAT16: dict[str, str | bool] = {"dtype": "bfloat16"}


class Record(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


RecordT = TypeVar("RecordT", bound=Record)


class SealedRecord(Record):
    """A record that holds the checksum of its own canonical JSON: its keys sorted, no spaces."""

    format: int = FORMAT_VERSION
    crc32c: int = 0
    """Of the JSON with this field at 0."""

    def sealed(self) -> Self:
        """Return the record with its checksum filled in."""
        content = _canonical(self.model_dump(mode="json") | {"crc32c": 0})
        return self.model_copy(update={"crc32c": crc32c(content)})

    def to_bytes(self) -> bytes:
        return _canonical(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, content: bytes, path: str) -> Self:
        """Parse and check a record; raise StoreCorruptError, or StoreError for a newer format."""
        record = parse_record(cls, content, path)
        # In the bytes as they are: to write a large record again takes as long as to parse it.
        checksum = crc32c(content.replace(b'"crc32c":%d,' % record.crc32c, b'"crc32c":0,', 1))
        if record.crc32c != checksum:
            raise StoreCorruptError(
                f"{path}: the record's checksum is {checksum:08x}, it says {record.crc32c:08x}. The file was changed "
                "or damaged; `specx store verify` says what can be done."
            )
        return record


class TargetIdentity(Record):
    """Which model made the features."""

    architecture: str
    """The one entry of ``architectures`` in the target's config."""
    config_hash: str
    """sha256 of the config, without the keys that do not change the model."""
    weights_hash: str
    """sha256 over every tensor's name, dtype, shape and bytes."""


class DatasetInfo(SealedRecord):
    """``dataset.json``: what every part of a store has in common. Immutable."""

    target: TargetIdentity
    compute_dtype: str
    """Type the target ran in: features of a bfloat16 run are not those of a float32 run."""
    boundaries: tuple[int, ...]
    """Block b's input is boundary b; ascending."""
    hidden_size: int
    vocab_size: int
    top_k: int
    codec: CodecName
    last_hidden: bool = True
    """Whether the last hidden states are kept; without them logits are known by their top-K only."""

    def require_same(self, wanted: "DatasetInfo", root: str) -> None:
        """Raise StoreMismatchError naming every field in which ``wanted`` differs."""
        differing = differences(self, wanted, "in the store")
        if differing:
            raise StoreMismatchError(
                f"{root}: the store was made by another target or with other settings: "
                f"{'; '.join(differing)}. Use another --store, or the settings of this one."
            )


def differences(found: Record, wanted: Record, where: str) -> list[str]:
    """Return what differs between two records of a kind, a phrase a field; ``where`` is where ``found`` was."""
    there, here = (_flat(record.model_dump(mode="json")) for record in (found, wanted))
    return [
        f"{key} is {there[key]} {where}, {here[key]} in this run"
        for key in there
        if there[key] != here[key] and key != "crc32c"
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


class StoredObject(Record):
    """One file of a part."""

    key: str
    """Path relative to the part."""
    size: int
    xxh128: str
    """XXH3 128-bit hash of the file, hex."""
    chunks_xxh128: str = ""
    """Of a shard: the same of its index and its chunks' checksums, to tell another shard in its place at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a sequence came from."""

    source: str
    row: int
    category: str = ""


class Reject(Record):
    """One row of the data that did not become a sequence, and why."""

    source: str
    row: int
    reason: str
    detail: str


class SequenceColumns(Record):
    """The sequences of one part, in the order they are stored; S entries a column."""

    ids: tuple[str, ...]
    """Hex of the 16-byte hash of the token ids."""
    lengths: tuple[int, ...]
    categories: tuple[str, ...]
    sources: tuple[str, ...]
    rows: tuple[int, ...]

    def model_post_init(self, context: Any, /) -> None:
        sizes = {len(getattr(self, name)) for name in type(self).model_fields}
        if len(sizes) != 1:
            raise ValueError("the columns of sequences have different lengths")


class CommitRecord(SealedRecord):
    """``commits/u….json``: makes one part exist."""

    unit: int
    part: str
    sequences: SequenceColumns
    rejected: tuple[Reject, ...] = ()
    objects: tuple[StoredObject, ...]
    quantization_error: dict[str, float] = Field(default_factory=dict)
    """Of each array with a lossy codec: relative L2 error, measured on a sample of the part's tokens."""
    writer: str
    time: str
    """UTC, ISO 8601."""


class FileHashes(SealedRecord):
    """``target/hashes.json``: what the other files of the directory are."""

    files: dict[str, str]
    """XXH3 128-bit hash, hex, by the path within the directory."""


def _canonical(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()


def parse_record(kind: type[RecordT], content: bytes, path: str) -> RecordT:
    """Return the record in ``content``; the format version is judged before anything else."""
    try:
        # Most are sound, and large ones take half the time in one go.
        record = kind.model_validate_json(content)
    except ValidationError:
        record = None
    if record is not None and getattr(record, "format", 0) <= FORMAT_VERSION:
        return record
    try:
        tree = json.loads(content)
        version = tree["format"]
        if not isinstance(version, int):
            raise TypeError(f"format is {version!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorruptError(
            f"{path}: not a record of a feature store ({error}). Delete it if it is a leftover; "
            "a damaged commit record's sequences are extracted again by `specx extract`."
        ) from error
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path}: format {version} is newer than {FORMAT_VERSION}, the newest this specx reads. Upgrade specx."
        )
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreCorruptError(f"{path}: {where}: {first['msg']}. The file was changed or damaged.") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """How one array of a part is laid out."""

    name: str
    dtype: np.dtype[Any]
    """On disk. bfloat16 has no numpy type: its bits are stored as uint16."""
    inner_shape: tuple[int, ...]
    """Shape behind the token axis."""
    chunk: tuple[int, ...]
    shard_tokens: int
    is_hidden: bool = False
    """Hidden states: bits of bfloat16, which lossy codecs quantise."""
    attributes: dict[str, str | bool] = field(default_factory=dict)


def array_specs(info: DatasetInfo) -> dict[str, ArraySpec]:
    """Return the arrays of every part of a store, by name, all with tokens as first axis."""
    L, H, K = len(info.boundaries), info.hidden_size, info.top_k
    specs = [
        ArraySpec(
            name="aux_hidden",
            dtype=np.dtype(np.uint16),
            inner_shape=(L, H),
            # One boundary a chunk: it compresses better, and a run reads only the boundaries it trains on.
            chunk=(256, 1, H),
            shard_tokens=4096,
            is_hidden=True,
            attributes=_BFLOAT16,
        )
    ]
    if info.last_hidden:
        specs.append(
            ArraySpec(
                name="last_hidden",
                dtype=np.dtype(np.uint16),
                inner_shape=(H,),
                chunk=(256, H),
                shard_tokens=4096,
                is_hidden=True,
                attributes=_BFLOAT16 | {"normed": True},
            )
        )
    specs += [
        ArraySpec(name="topk_ids", dtype=np.dtype(np.uint32), inner_shape=(K,), chunk=(1024, K), shard_tokens=16384),
        ArraySpec(
            name="topk_logprob", dtype=np.dtype(np.float16), inner_shape=(K,), chunk=(1024, K), shard_tokens=16384
        ),
    ]
    for name, dtype in (
        ("lse", np.float32),
        ("argmax", np.int32),
        ("input_ids", np.int32),
        ("loss_mask", np.uint8),
    ):
        specs.append(ArraySpec(name=name, dtype=np.dtype(dtype), inner_shape=(), chunk=(1024,), shard_tokens=65536))
    return {spec.name: spec for spec in specs}


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceFeatures:
    """What the target made of one sequence of T tokens, as it goes to disk."""

    input_ids: Array
    """(T,) int32"""
    loss_mask: Array
    """(T,) uint8, 1 on the tokens the target sampled"""
    aux_hidden: Array
    """(T, L, H) uint16, bfloat16 bits, boundaries ascending"""
    last_hidden: Array | None = None
    """(T, H) uint16, bfloat16 bits, after the final norm; None in a store without"""
    topk_ids: Array
    """(T, K) uint32, by falling logit"""
    topk_logprob: Array
    """(T, K) float16, logit minus log-sum-exp"""
    lse: Array
    """(T,) float32, log-sum-exp of the logits over the full vocabulary"""
    argmax: Array
    """(T,) int32, over the full vocabulary"""

    def arrays(self) -> dict[str, Array]:
        """Return the arrays there are, by their name on disk."""
        arrays = {name: getattr(self, name) for name in self.__slots__}
        return {name: rows for name, rows in arrays.items() if rows is not None}
