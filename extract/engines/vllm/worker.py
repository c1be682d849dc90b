"""What vLLM's workers do for us beside their own work: they end when the process that asked for them has.

vLLM's processes outlive a parent that is killed, and keep their GPU's memory for good.
"""

import contextlib
import os
import select
import signal
import threading
from pathlib import Path


class FollowingWorker:
    """A method that vLLM adds to its workers."""

    def specx_follow(self, driver: int) -> None:
        """End this process, and vLLM's own ones above it, once the process ``driver`` has ended, however it did.

        Not sooner: ^C on a terminal reaches all, and it is the driver that then ends the others in order.
        Nothing happens in a worker that ``driver`` did not start: one of Ray, which ends its workers itself.
        """
        above = _processes_below(driver)
        if above is None:
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Opened while they are surely vLLM's. Once the driver is gone, the parent of what it started is whoever
        # adopts orphans, such as the user's session or a cluster's job keeper, and must not be touched.
        ended, *between = [os.pidfd_open(pid) for pid in (driver, *above)]

        def follow() -> None:
            select.select([ended], [], [])
            for process in between:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            os._exit(1)

        threading.Thread(target=follow, name="specx-follow", daemon=True).start()


def _processes_below(driver: int) -> list[int] | None:
    """Return the processes between this one and ``driver``, the parent first; None if it is not above this one."""
    found: list[int] = []
    pid = os.getppid()
    while pid != driver:
        found.append(pid)
        try:
            # Behind the name in brackets: state, parent.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:  # the end, or somebody else's that may not be seen
            return None
    return found
