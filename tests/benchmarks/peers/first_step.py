"""Runs a training command in this process to the end of its first optimizer step, and says so then.

    python first_step.py MODULE:FUNCTION [ARGUMENT ...]

The function is what the project installs as its command; the arguments are the command's. The line that is printed is
JSON: the processor seconds of the process since it began. The parent takes the time.
"""

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn


def end(optimizer: Any, arguments: Any, keywords: Any) -> NoReturn:
    """End the process on the spot: threads and children that load data have nothing to finish."""
    os.write(ANSWERS, f"{json.dumps({'cpu_s': time.process_time()})}\n".encode())
    os._exit(0)


class AfterOptimizers(MetaPathFinder):
    """Has ``end`` called at the end of a step, from when the command itself imports optimizers on."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch.optim.optimizer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            module.register_optimizer_step_post_hook(end)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def main() -> None:
    module, _, function = sys.argv.pop(1).partition(":")
    sys.meta_path.insert(0, AfterOptimizers())
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    ANSWERS = os.dup(1)
    # What the project prints.
    os.dup2(2, 1)
    main()
