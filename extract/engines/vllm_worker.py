"""What vLLM's workers do for us beside their own work: they end when the process that asked for them has.

vLLM's processes outlive a parent that is killed, and keep their GPU's memory for good.
"""

import os
import select
import signal
import threading


class FollowingWorker:
    """A method that vLLM adds to its workers."""

    def specx_follow(self, driver: int) -> None:
        """End this process, and vLLM's own one above it, once the process ``driver`` has ended, however it did."""
        if driver == os.getpid():
            return
        ended = os.pidfd_open(driver)

        def follow() -> None:
            select.select([ended], [], [])
            if os.getppid() not in (1, driver):
                os.kill(os.getppid(), signal.SIGKILL)
            os._exit(1)

        threading.Thread(target=follow, name="specx-follow", daemon=True).start()
