"""A report as a person sees it: in a browser, on a phone and on a desk, by day and by night, and offline."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page

from .browser import find_browser, running

Scheme = Literal["light", "dark"]

BACKGROUNDS = {"light": "rgb(247, 247, 245)", "dark": "rgb(20, 23, 26)"}
BLUES = {"light": "rgb(37, 99, 168)", "dark": "rgb(110, 168, 230)"}
FIRST_CHART = "document.querySelector('.chart').innerHTML"
TOO_WIDE = """[...document.querySelectorAll('main *')].filter(
  (each) => !each.closest('.table') && each.getBoundingClientRect().right > innerWidth + 0.5
).map((each) => each.outerHTML.slice(0, 80))"""
EMPTY = """[...document.querySelectorAll('.chart')].filter(
  (each) => !each.querySelector('.trace path')
).map((each) => each.id)"""
CUT_OFF = """[...document.querySelectorAll('.chart svg text')].filter((each) => {
  const box = each.getBoundingClientRect(), card = each.closest('.chart').getBoundingClientRect();
  return each.textContent && box.width && (box.left < card.left - 1 || box.right > card.right + 1);
}).map((each) => each.textContent)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A report in a tab, and what came of it."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """Lines on the console, and exceptions that nothing caught"""
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for, the page's own included"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium here: run `make browser`, or put one on the PATH")
    with running(found, tmp_path_factory.mktemp("cache")) as browser:
        yield browser


def wait_until(page: Page, condition: str) -> None:
    """Wait until JavaScript is true; the page's policy forbids what playwright has for that."""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"{condition} did not become true"
        time.sleep(0.05)


@contextmanager
def opened(browser: Browser, report: Path, width: int, scheme: Scheme = "light") -> Iterator[Opened]:
    """Open a report on a screen of ``width`` CSS pixels and wait until it is drawn."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found = Opened(page=page)
    page.on("console", lambda line: found.complaints.append(line.text))
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn=yes]")
    yield found
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["store", "run", "all"])
def test_a_report_is_drawn_whole_without_an_error_or_a_request(
    browser: Browser, reports: dict[str, Path], name: str, width: int, scheme: Scheme
) -> None:
    with opened(browser, reports[name], width, scheme) as found:
        assert found.complaints == []
        assert found.requests == [reports[name].as_uri()]
        page = found.page
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate(CUT_OFF) == []
        assert page.evaluate("document.querySelectorAll('.chart').length") > 5
        assert page.evaluate(EMPTY) == []
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == BACKGROUNDS[scheme]
        assert BLUES[scheme] in page.evaluate(FIRST_CHART)


def test_the_charts_follow_the_system_from_day_to_night(browser: Browser, reports: dict[str, Path]) -> None:
    with opened(browser, reports["run"], 1280) as found:
        assert BLUES["light"] in found.page.evaluate(FIRST_CHART)
        found.page.emulate_media(color_scheme="dark")
        wait_until(found.page, f"{FIRST_CHART}.includes('{BLUES['dark']}')")
        assert BLUES["light"] not in found.page.evaluate(FIRST_CHART)


def test_charts_narrow_with_the_window(browser: Browser, reports: dict[str, Path]) -> None:
    with opened(browser, reports["store"], 1280) as found:
        found.page.set_viewport_size({"width": 390, "height": 900})
        wait_until(found.page, "document.querySelector('.chart .main-svg').getBoundingClientRect().width < 390")
        wait_until(found.page, "document.documentElement.scrollWidth === 390")
