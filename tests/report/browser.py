"""A headless Chromium, driven over a pipe: no package is needed for it.

``find_browser`` looks for the one that ``make browser`` installs, and for any on the PATH.
"""

import base64
import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INSTALLED = Path(__file__).parents[2] / ".browser"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell", "chrome")
_FLAGS = (
    "--headless",
    # Root has no sandbox, and the pages are our own.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-software-rasterizer",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_TIMEOUT_S = 60.0


def find_browser() -> Path | None:
    """Return the Chromium to use, if there is one."""
    candidates = [os.environ.get("SPECX_CHROMIUM"), INSTALLED / "chromium", *map(shutil.which, _NAMES)]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


class Page:
    """One tab."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str, *, width: int, height: int = 900, scheme: str = "light") -> None:
        """Go to a page as it looks on a screen of ``width`` CSS pixels; what happened before is forgotten."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.prefer(scheme)
        self.call("Page.navigate", url="about:blank")
        self._events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def prefer(self, scheme: str) -> None:
        """Choose the colour scheme of the system, dark or light."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression} did not become true: {self.complaints()}"
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Return what the page wrote to the console, and exceptions that nothing caught."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"])[:400] for event in self._events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for, with the page's own."""
        sent = (event for event in self._events if event.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path: Path, height: int | None = None) -> None:
        """Write a PNG of the page, of all of it or of the first ``height`` pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        image = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def _message(self) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._read, selectors.EVENT_READ)
            while b"\0" not in self._buffer:
                assert selector.select(_TIMEOUT_S), "the browser does not answer"
                received = os.read(self._read, 1 << 16)
                assert received, f"the browser ended with {self._process.poll()}"
                self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed


@contextmanager
def browser_page(browser: Path, profile: Path) -> Iterator[Page]:
    """Start the browser with an empty profile and give a tab; end it when the block is left."""
    commands, answers = os.pipe(), os.pipe()
    # The browser reads at 3 and writes at 4.
    shell = 'exec "$@" 3<&"$READ_FROM" 4>&"$WRITE_TO"'
    # Caches of fonts go with the profile.
    environment = os.environ | {"XDG_CACHE_HOME": str(profile)}
    environment |= {"READ_FROM": str(commands[0]), "WRITE_TO": str(answers[1])}
    if browser.parent == INSTALLED:
        # It brings the libraries and the font that a bare machine lacks.
        environment |= {"LD_LIBRARY_PATH": str(INSTALLED / "lib"), "FONTCONFIG_PATH": str(INSTALLED / "fonts")}
    process = subprocess.Popen(
        ["bash", "-c", shell, "browser", browser, *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(commands[0], answers[1]),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Page(process, commands[1], answers[0])
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(commands[1])
        os.close(answers[0])
