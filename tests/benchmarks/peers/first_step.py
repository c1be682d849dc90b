"""Runs a training command in this process to the end of its first optimizer step, and says so then.

    python first_step.py MODULE:FUNCTION [ARGUMENT ...]

The function is what the project installs as its command; the arguments are the command's. The line that is printed is
JSON: the processor seconds of the process since it began. The parent takes the time.
"""

import importlib
import json
import os
import sys
import time
from typing import Any, NoReturn


def end(optimizer: Any, arguments: Any, keywords: Any) -> NoReturn:
    """End the process on the spot: threads and children that load data have nothing to finish."""
    os.write(ANSWERS, f"{json.dumps({'cpu_s': time.process_time()})}\n".encode())
    os._exit(0)


def main() -> None:
    module, _, function = sys.argv.pop(1).partition(":")
    command = getattr(importlib.import_module(module), function)
    # The command's module first: what it does before it imports torch is a part of its start.
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(end)
    command()


if __name__ == "__main__":
    ANSWERS = os.dup(1)
    # What the project prints.
    os.dup2(2, 1)
    main()
