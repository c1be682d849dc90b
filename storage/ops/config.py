"""Settings of the ``specx store`` commands that need no target."""

from typing import Annotated

from pydantic import Field, field_validator

from ...config import Option, RunConfig
from ..codec_names import CodecName

StorePath = Annotated[str, Option(is_argument=True)]
TokensPerPart = Annotated[int, Field(ge=1)]


class InfoConfig(RunConfig):
    """A store to describe."""

    store: StorePath
    """Feature store: a directory or s3:// URL."""


class VerifyConfig(RunConfig):
    """A store to read in full."""

    store: StorePath
    """Feature store: a directory or s3:// URL."""
    drop_bad: bool = False
    """Un-commit damaged parts; rerunning `specx extract` fills exactly those."""


class SelectConfig(RunConfig):
    """A view to make, and what its sequences are like; None is no condition."""

    store: StorePath
    """Feature store: a directory or s3:// URL."""
    name: Annotated[str, Option(name="as")]
    """Name of the new view."""
    view: tuple[str, ...] = ()
    """Choose from these views instead of the whole store. May be repeated."""
    category: tuple[str, ...] = ()
    """Keep sequences of this category. May be repeated."""
    min_length: int | None = None
    """Shortest sequence to keep, in tokens."""
    max_length: int | None = None
    """Longest sequence to keep, in tokens; longer ones are left out, not cut."""
    source: str | None = None
    """Keep sequences whose source name matches this regular expression anywhere."""
    limit: int | None = None
    """Keep at most N of the remaining sequences."""


class MergeConfig(RunConfig):
    """Stores to add to another."""

    sources: Annotated[tuple[str, ...], Option(is_argument=True), Field(min_length=1)]
    """Stores of one target that were made with the same settings."""
    into: str
    """Store to add them to; created if there is none."""
    link: bool = False
    """Share files by hard links, which takes no space. All stores must be on one local disk."""
    tokens_per_part: TokensPerPart = 24_576
    """Tokens committed at once."""


class PruneConfig(RunConfig):
    """A store to copy, and what to keep of it; None is as in that store."""

    store: StorePath
    """Feature store to read: a directory or s3:// URL."""
    into: str
    """Store to write; created if there is none."""
    boundaries: tuple[int, ...] | None = None
    """Auxiliary hidden states to keep. All by default."""
    codec: CodecName | None = None
    """Codec of the new store. By default that of the old one."""
    last_hidden: bool | None = None
    """Keep last hidden states (for exact target distributions). By default as in the old store."""
    tokens_per_part: TokensPerPart = 24_576
    """Tokens committed at once."""

    @field_validator("boundaries")
    @classmethod
    def _some(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and not value:
            raise ValueError("must name a boundary; leave it out to keep all")
        return value


class GcConfig(RunConfig):
    """A store to clean, and how."""

    store: StorePath
    """Feature store: a directory or s3:// URL."""
    older_than: float = 24.0
    """Remove only what has not changed for this many hours."""
    dry_run: bool = False
    """List what would be removed, and remove nothing."""
