"""specx: extract a target's features once, train speculative-decoding drafts from them as often as you like.

The public API is what ``__all__`` names. Each name is imported when it is first used, so that ``import specx`` loads
no library; ``specx.train`` and ``specx.extract`` are packages that can be called.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .extract.config import ExtractConfig as ExtractConfig
    from .extract.pipeline import run as extract
    from .storage.store import FeatureStore as FeatureStore
    from .storage.store import open_store as open_store
    from .train.config import TrainConfig as TrainConfig
    from .train.data.batch import Batch as Batch
    from .train.dataset import FeatureDataset as FeatureDataset
    from .train.dataset import packed_batches as packed_batches
    from .train.evaluate.config import EvaluateConfig as EvaluateConfig
    from .train.evaluate.pipeline import run as evaluate
    from .train.export.write import export as export
    from .train.families.load import load_draft as load_draft
    from .train.pipeline import run as train

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "EvaluateConfig",
    "ExtractConfig",
    "FeatureDataset",
    "FeatureStore",
    "SpecxError",
    "TrainConfig",
    "__version__",
    "evaluate",
    "export",
    "extract",
    "load_draft",
    "open_store",
    "packed_batches",
    "train",
]

_PLACES = {
    "Batch": "train.data.batch:Batch",
    "EvaluateConfig": "train.evaluate.config:EvaluateConfig",
    "ExtractConfig": "extract.config:ExtractConfig",
    "FeatureDataset": "train.dataset:FeatureDataset",
    "FeatureStore": "storage.store:FeatureStore",
    "TrainConfig": "train.config:TrainConfig",
    "evaluate": "train.evaluate.pipeline:run",
    "export": "train.export.write:export",
    "extract": "extract",
    "load_draft": "train.families.load:load_draft",
    "open_store": "storage.store:open_store",
    "packed_batches": "train.dataset:packed_batches",
    "train": "train",
}


class SpecxError(Exception):
    """Something a user can cause and mend.

    The message is one line: where, what was found, what was expected, what to do.
    """


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    found = import_module(f"{__name__}.{module}")
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
