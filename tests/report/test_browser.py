"""A report as a person sees it: in a browser, on a phone and on a desk, by day and by night, and offline."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .browser import Page, browser_page, find_browser

BACKGROUNDS = {"light": "rgb(247, 247, 245)", "dark": "rgb(20, 23, 26)"}
BLUES = {"light": "rgb(37, 99, 168)", "dark": "rgb(110, 168, 230)"}
IS_DRAWN = "document.documentElement.dataset.drawn === 'yes'"
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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium here: run `make browser`, or put one on the PATH")
    with browser_page(found, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["store", "run", "all"])
def test_a_report_is_drawn_whole_without_an_error_or_a_request(
    browser: Page, reports: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    url = reports[name].as_uri()
    browser.open(url, width=width, scheme=scheme)
    browser.wait_for(IS_DRAWN)
    assert browser.complaints() == []
    assert browser.requests() == [url]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(TOO_WIDE) == []
    assert browser.evaluate(CUT_OFF) == []
    assert browser.evaluate("document.querySelectorAll('.chart').length") > 5
    assert browser.evaluate(EMPTY) == []
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == BACKGROUNDS[scheme]
    assert BLUES[scheme] in browser.evaluate("document.querySelector('.chart').innerHTML")


def test_the_charts_follow_the_system_from_day_to_night(browser: Page, reports: dict[str, Path]) -> None:
    browser.open(reports["run"].as_uri(), width=1280, scheme="light")
    browser.wait_for(IS_DRAWN)
    inner = "document.querySelector('.chart').innerHTML"
    assert BLUES["light"] in browser.evaluate(inner)
    browser.prefer("dark")
    browser.wait_for(f"{inner}.includes('{BLUES['dark']}')")
    assert BLUES["light"] not in browser.evaluate(inner)


def test_charts_narrow_with_the_window(browser: Page, reports: dict[str, Path]) -> None:
    browser.open(reports["store"].as_uri(), width=1280)
    browser.wait_for(IS_DRAWN)
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=900, deviceScaleFactor=1, mobile=False)
    browser.wait_for("document.querySelector('.chart .main-svg').getBoundingClientRect().width < 390")
    browser.wait_for("document.documentElement.scrollWidth === 390")
