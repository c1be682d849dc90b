"""What can go wrong with a store, as the user is told."""

from .. import SpecxError


class StoreError(SpecxError):
    """The store cannot be used as asked."""


class StoreCorruptError(StoreError):
    """Bytes of the store differ from what was committed."""


class StoreMismatchError(StoreError):
    """The store was made with another target or other settings."""


class StoreFullError(StoreError):
    """The disk has no room for what is being written; what was finished before is kept."""
