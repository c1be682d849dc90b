"""The command line as its installed script starts it, in a file that vLLM's processes import as theirs."""

import signal
import sys

from specx.cli import main

SPECX = [sys.executable, __file__]
"""The command line as the beginning of a command that a test starts, and kills, by itself."""

if __name__ == "__main__":
    # A shell that runs the tests in the background has its children ignore ^C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
