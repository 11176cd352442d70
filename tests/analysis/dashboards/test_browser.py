"""Dashboards in a real browser: nothing is loaded, nothing goes wrong, and no token is obeyed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.analysis.dashboards.chromium import Browser, needs_chromium

pytestmark = needs_chromium

BACKGROUND = "getComputedStyle(document.body).backgroundColor"
ROWS = "[...document.querySelectorAll('tbody tr')].map(r=>+r.cells[0].textContent)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def luminance(browser: Browser, of: str = BACKGROUND) -> float:
    colour = str(browser.evaluate(of))
    return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 765


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "features/4.html"])
def test_page_in_light_and_dark(browser: Browser, made: Path, name: str, scheme: str) -> None:
    browser.open(made / name, scheme=scheme)
    text = luminance(browser, "getComputedStyle(document.body).color")
    paper = luminance(browser)
    assert (paper > 0.9 and text < 0.3) if scheme == "light" else (paper < 0.2 and text > 0.7)
    picture = browser.screenshot()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000, "an empty page has less"
    # What is too wide can be scrolled to in no page.
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_index_is_sorted_and_searched(browser: Browser, made: Path) -> None:
    browser.open(made / "index.html")
    assert browser.evaluate(ROWS) == [1, 3, 4, 5, 11]
    browser.evaluate("document.querySelector('th[data-c=\"2\"] button').click()")
    largest = browser.evaluate("[...document.querySelectorAll('tbody tr')].map(r=>+r.cells[2].textContent)")
    assert largest == sorted(largest, reverse=True)
    browser.evaluate("document.querySelector('th[data-c=\"2\"] button').click()")
    assert browser.evaluate(ROWS) != [1, 3, 4, 5, 11]
    browser.press("/")
    browser.press("1")
    browser.press("1")
    assert browser.evaluate("find.value") == "11"
    assert browser.evaluate(ROWS) == [11]
    assert browser.evaluate("note.textContent") == "1 to 1 of 1"


def test_keys_lead_from_page_to_page(browser: Browser, made: Path) -> None:
    browser.open(made / "features/3.html")
    for key, name in (
        ("ArrowRight", "4.html"),
        ("ArrowLeft", "3.html"),
        ("j", "4.html"),
        ("i", "index.html"),
    ):
        browser.loading(lambda key=key: browser.press(key))
        assert str(browser.evaluate("location.href")).endswith(name)
    browser.loading(lambda: browser.evaluate("document.querySelector('tbody a').click()"))
    assert str(browser.evaluate("location.href")).endswith("features/1.html")


def test_nothing_is_loaded_run_or_complained_of(browser: Browser, made: Path) -> None:
    """The pages hold tokens that are scripts, images and ends of elements."""
    for path in [made / "index.html", *sorted((made / "features").iterdir())]:
        browser.open(path)
        assert browser.evaluate("document.title") != "hacked"
        assert browser.evaluate("document.images.length") == 0
        assert browser.evaluate("document.querySelectorAll('script').length") == (
            2 if "index" in path.name else 1
        )
    assert {url.rpartition("/")[2] for url in browser.requests()} <= {
        "index.html",
        *(path.name for path in (made / "features").iterdir()),
    }
    assert all(url.startswith("file://") for url in browser.requests())
    assert browser.complaints() == []
