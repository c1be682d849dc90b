"""A worker ends with the process that asked for it, and nothing else does."""

import os
import subprocess
import sys

# A process that adopts orphans, as a user's session or a cluster's job keeper does; below it a driver, and
# below that what vLLM starts, on one GPU or with processes of its own between. Each prints the worker's id.
KEEPER = """
import ctypes, os, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
driver = subprocess.Popen([sys.executable, "-c", os.environ["DRIVER"]], stdout=subprocess.PIPE, text=True)
pids = [int(pid) for pid in driver.stdout.readline().split()]
driver.kill()
driver.wait()
deadline = time.monotonic() + 20
while pids and time.monotonic() < deadline:
    # Adopted: waiting for them takes them off the list of processes.
    ended, _ = os.waitpid(-1, os.WNOHANG)
    pids = [pid for pid in pids if pid != ended]
    time.sleep(0.02)
print("still there:", pids)
"""
DRIVER = """
import os, subprocess, sys, time
os.environ["DRIVER_PID"] = str(os.getpid())
subprocess.Popen([sys.executable, "-c", os.environ["BELOW"]])
time.sleep(60)
"""
CORE = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", os.environ["WORKER"]])
time.sleep(60)
"""
WORKER = """
import os, time
from specx.extract.engines.vllm.worker import FollowingWorker
driver = int(os.environ["DRIVER_PID"])
FollowingWorker().specx_follow(driver)
print(os.getpid(), *([os.getppid()] if os.getppid() != driver else []), flush=True)
time.sleep(60)
"""


def kept(below: str) -> str:
    environment = {**os.environ, "DRIVER": DRIVER, "BELOW": below, "WORKER": WORKER}
    process = subprocess.run(
        [sys.executable, "-c", KEEPER], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert process.returncode == 0, (process.returncode, process.stderr)
    return process.stdout.strip()


def test_a_worker_started_by_the_driver_ends_with_it_and_who_adopts_it_lives() -> None:
    assert kept(WORKER) == "still there: []"


def test_a_worker_ends_with_the_driver_and_so_does_the_process_between() -> None:
    assert kept(CORE) == "still there: []"


def test_a_worker_that_the_driver_did_not_start_goes_on() -> None:
    program = f"{WORKER.replace('time.sleep(60)', 'time.sleep(1)')}\nprint('went on')"
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        command = f"import os\nos.environ['DRIVER_PID'] = '{stranger.pid}'\n{program}"
        worker = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        worker.stdout.readline()
    finally:
        stranger.kill()
        stranger.wait()
    assert worker.communicate(timeout=300)[0] == "went on\n"
