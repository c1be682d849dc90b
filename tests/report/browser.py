"""A headless Chromium: the one that ``make browser`` installs, or any on the PATH."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

INSTALLED = Path(__file__).parents[2] / ".browser"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell", "chrome")


def find_browser() -> Path | None:
    """Return the Chromium to use, if there is one."""
    candidates = [os.environ.get("SPECX_CHROMIUM"), INSTALLED / "chromium", *map(shutil.which, _NAMES)]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


@contextmanager
def running(path: Path, cache: Path) -> Iterator[Browser]:
    """Start a browser that keeps the caches of its fonts in ``cache``; end it when the block is left."""
    environment: dict[str, str | float | bool] = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    if path.parent == INSTALLED:
        # It brings the libraries and the font that a bare machine lacks.
        environment |= {"LD_LIBRARY_PATH": str(INSTALLED / "lib"), "FONTCONFIG_PATH": str(INSTALLED / "fonts")}
    with sync_playwright() as playwright:
        # Root has no sandbox, and the pages are our own.
        browser = playwright.chromium.launch(
            executable_path=path, env=environment, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()
