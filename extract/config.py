"""Settings of ``specx extract``."""

import datetime
from typing import Any, Literal

from pydantic import Field, field_validator

from ..config import RunConfig
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


class ExtractConfig(RunConfig):
    """What to run through the target and what to keep of it."""

    target: str
    """Local directory or hub id of the target."""
    data: tuple[str, ...] = Field(min_length=1)
    """Files, directories, patterns or splits of the target's own answers; see ``sources``."""
    store: str
    """Feature store to create or extend."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What runs the target; auto is vllm where a GPU is found."""
    boundaries: tuple[int, ...] | None = None
    """Auxiliary hidden states: b is the input of decoder block b. None: low, middle and high, see ``target``."""
    top_k: int = Field(default=128, ge=1)
    """Logits kept per token."""
    codec: CodecName = "lossless"
    """How arrays are compressed; ``int8`` and ``fp8`` quantise the hidden states."""
    last_hidden: bool = True
    """Keep the last hidden states, from which a run has exact targets; without, it has the top-K logits."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest sequence in tokens; None is the target's own ``max_position_embeddings``."""
    too_long: Literal["reject", "truncate"] = "reject"
    """What happens to a longer one."""
    view: str | None = None
    """Name under which the store remembers which sequences these are, with their masks and categories."""
    limit: int | None = Field(default=None, ge=1)
    """Rows to read of all data together; None is all."""
    shard: tuple[int, int] | None = None
    """(i, n): of the rows read, counted over all data, only each n-th from the i-th on; written ``i/n``."""
    turns: Literal["last", "all"] = "last"
    """Answers of a conversation that are the target's own: the last, or each, with the prompt it had."""
    reasoning_effort: str | None = None
    """Of rows that name none; None is the chat template's own."""
    date: str | None = None
    """Day in the prompt, YYYY-MM-DD, of rows that name none; None is the chat template's own."""
    messages_column: str | None = None
    """Column of the conversations; None is ``conversations`` or ``messages``."""
    input_ids_column: str | None = None
    """None is ``input_ids``."""
    loss_mask_column: str | None = None
    """None is ``loss_mask``."""
    category_column: str | None = None
    """None is ``category``, which rows may lack."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type the target runs in; auto is its checkpoint's."""
    device: str = "auto"
    """torch device of the transformers engine; auto is CUDA where there is one."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one vLLM engine that share each layer."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Groups of GPUs of one vLLM engine, each with some of the layers; vLLM 0.32 takes hidden states of 1 only."""
    expert_parallel: bool = False
    """Whether the GPUs of ``tensor_parallel`` hold whole experts instead of a slice of each."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """More of vLLM's own engine arguments, by name."""
    workers: int = Field(default=1, ge=1)
    """Engines, each in a Ray actor where there are several."""
    ray_address: str | None = None
    """Ray cluster to run on; None starts one on this machine."""
    tokens_per_part: int = Field(default=24_576, ge=1)
    """A unit of this size is committed at once, and is what a killed run loses at most."""
    queue_bytes: int = Field(default=256 << 20, ge=1)
    """Outputs that may wait for the writer of an engine before the engine waits."""
    force: bool = False
    """Start although the disk is expected to be too small."""

    @field_validator("boundaries")
    @classmethod
    def _ascending(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or list(value) != sorted(set(value))):
            raise ValueError(f"must be strictly increasing, got {','.join(map(str, value))}")
        return value

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

    _day = field_validator("date", mode="before")(as_day)
