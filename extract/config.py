"""Settings of ``specx extract`` and ``specx store plan``."""

import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from ..config import Option, RunConfig
from ..storage.codec_names import CodecName


def as_day(value: Any) -> str | None:
    """Return a setting that is a day as YYYY-MM-DD; raise ValueError if it is none."""
    if value is None:
        return None
    # YAML reads an unquoted date as one.
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError as error:
        raise ValueError(f"must be YYYY-MM-DD, got {value}") from error


class RowSettings(RunConfig):
    """How rows of a data set are read, whether the target is to be run over them or to answer them."""

    panel: ClassVar[str] = "Data"

    limit: int | None = Field(default=None, ge=1)
    """Number of rows to read, over all data together. All by default."""
    messages_column: str | None = None
    """Column of the conversations. By default `conversations` or `messages`."""
    category_column: str | None = None
    """Column of the categories, which rows may lack. By default `category`."""


class SampleSettings(RowSettings):
    """Which rows become sequences, and how long these may be."""

    panel: ClassVar[str] = "Data"

    input_ids_column: str | None = None
    """Column of recorded token ids. By default `input_ids`."""
    loss_mask_column: str | None = None
    """Column of their loss mask. By default `loss_mask`."""
    turns: Literal["last", "all"] = "last"
    """Answers of a conversation that the target wrote: the last, or each one with the prompt it had."""
    shard: Annotated[tuple[int, int] | None, Option(is_text=True, metavar="I/N")] = None
    """Read only every N-th row, starting at row I, counted over all data; for example 0/4."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest sequence in tokens. By default the target's `max_position_embeddings`."""
    too_long: Literal["reject", "truncate"] = "reject"
    """What happens to longer sequences."""

    @field_validator("shard", mode="before")
    @classmethod
    def _shard(cls, value: Any) -> Any:
        if isinstance(value, str):
            parts = value.split("/")
            if len(parts) != 2 or not all(part.isdecimal() for part in parts):
                raise ValueError(f"must be i/n, such as 0/4, got {value}")
            return tuple(map(int, parts))
        return value

    @field_validator("shard")
    @classmethod
    def _within(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError(f"must be i/n with 0 <= i < n, got {value[0]}/{value[1]}")
        return value


class PromptSettings(RunConfig):
    """What the chat template puts into the prompt of a conversation."""

    panel: ClassVar[str] = "Prompt"

    reasoning_effort: str | None = None
    """Reasoning effort of rows that name none. By default the chat template's own."""
    date: Annotated[str | None, Option(metavar="YYYY-MM-DD")] = None
    """Date in the prompt of rows that name none. By default the chat template's own."""

    _day = field_validator("date", mode="before")(as_day)


class StoredSettings(RunConfig):
    """What a store keeps of each token."""

    panel: ClassVar[str] = "Stored features"

    boundaries: tuple[int, ...] | None = None
    """Auxiliary hidden states to store; b is the input of decoder block b. By default low, middle and high."""
    top_k: int = Field(default=128, ge=1)
    """Logits stored per token."""
    last_hidden: bool = True
    """Store last hidden states (for exact target distributions); without them training has the top-k logits."""
    codec: CodecName = "lossless"
    """Compression of the arrays; int8 and fp8 quantize the hidden states."""
    tokens_per_part: int = Field(default=24_576, ge=1)
    """Tokens committed at once, which is the most a killed run loses."""
    force: bool = False
    """Start even if the disk is expected to be too small."""

    @field_validator("boundaries")
    @classmethod
    def _ascending(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or list(value) != sorted(set(value))):
            raise ValueError(f"must be strictly increasing, got {','.join(map(str, value))}")
        return value


class EngineSettings(RunConfig):
    """How the target is loaded, shared by the commands that run it."""

    panel: ClassVar[str] = "Engine"

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type the target runs in; auto is that of its checkpoint."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one vLLM engine that share each layer."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Pipeline stages of one vLLM engine. vLLM 0.32 extracts hidden states with 1 only."""
    expert_parallel: bool = False
    """Whether each GPU of --tensor-parallel holds whole experts instead of a slice of every expert."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """More engine arguments of vLLM by name, such as max_num_seqs=64. May be repeated."""


class ExtractEngineSettings(EngineSettings):
    """Which engine runs the target, and its buffer."""

    panel: ClassVar[str] = "Engine"

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What runs the target; auto is vllm if there is a GPU, else transformers."""
    device: str = "auto"
    """Torch device of the transformers engine; auto is CUDA if available."""
    queue_bytes: int = Field(default=256 << 20, ge=1)
    """Bytes of outputs that may wait for an engine's writer before the engine pauses."""


class ClusterSettings(RunConfig):
    """Several engines over one store."""

    panel: ClassVar[str] = "Cluster"

    workers: int = Field(default=1, ge=1)
    """Number of engines that fill the store; more than one run as Ray actors."""
    ray_address: Annotated[str | None, Option(metavar="auto|HOST:PORT")] = None
    """Ray cluster to run on. By default one is started on this machine."""


class ExtractConfig(SampleSettings, PromptSettings, StoredSettings, ExtractEngineSettings, ClusterSettings):
    """What to run through the target and what to keep of it."""

    panel: ClassVar[str] = "Input and output"

    target: str
    """Local directory or hub id of the target."""
    data: tuple[str, ...] = Field(min_length=1)
    """The target's own answers: Parquet or JSON-lines files, directories, quoted patterns, or splits of a hub data set
    as ORG/NAME:SPLIT[,SPLIT] or ORG/NAME:CONFIG/SPLIT. May be repeated."""
    store: str
    """Feature store to create or extend: a directory or s3:// URL."""
    view: str | None = None
    """Name under which the store remembers these sequences, for `specx train --view`."""


class PlanConfig(ExtractConfig):
    """An extraction to be estimated, of some number of tokens or of data."""

    panel: ClassVar[str] = "Input and output"

    data: tuple[str, ...] = ()
    """Data to extract, as for `specx extract`, instead of --tokens. May be repeated."""
    store: str = ""
    """Where the store would be, to report the free space there."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of all sequences together, instead of --data."""
    sequences: int | None = Field(default=None, ge=1)
    """Number of sequences that --tokens are in. By default a usual length is assumed."""
    tokens_per_s: float | None = Field(default=None, gt=0)
    """Measured speed of an extraction, from which the hours are computed."""
