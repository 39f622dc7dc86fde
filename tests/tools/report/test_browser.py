"""The report as a reader sees it: opened from disk in Chromium."""

import numpy as np
import pytest
from PIL import Image

from llava_patch.tools.report import build

from . import browser as chromium

NONE = chromium.why_none()
pytestmark = pytest.mark.skipif(bool(NONE), reason=NONE or "there is a browser")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = chromium.start(tmp_path_factory.mktemp("profile"))
    yield started
    started.quit()


@pytest.mark.parametrize("width", [400, 1200])
def test_the_report_opens_offline(browser, report, width, tmp_path):
    folder = report[0]
    chromium.open_page(browser, folder / "report.html", width)
    assert chromium.problems(browser) == []
    values = build.read(folder)
    heads = browser.execute_script("return [...document.querySelectorAll('h2')].map(h => h.innerText)")
    for record in values["sections"]:
        assert any(head.startswith(record.title) for head in heads)
    figures = sum(len(record.found.figures) for record in values["sections"] if record.found)
    assert browser.execute_script("return document.images.length") == figures >= 6
    for link in browser.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.hash)"):
        assert browser.execute_script("return document.querySelector(arguments[0]) !== null", link)
    chromium.screenshot(browser, tmp_path / "page.png")
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert picture.shape[1] == pytest.approx(width, abs=20) and picture.shape[0] > 2000
    assert picture.std() > 10  # something is drawn


def test_it_prints(browser, report):
    chromium.open_page(browser, report[0] / "report.html", 1200)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"]
    assert len(printed) > 50_000


def test_a_dark_screen(browser, report):
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        chromium.open_page(browser, report[0] / "report.html", 1200)
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(23, 23, 26)" and chromium.problems(browser) == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize(
    "body, problem",
    [
        ("<img alt='a' src='lost.png'>", "image without a picture: a"),
        ("<img alt='a' src='http://127.0.0.1:9/a.png'>", "request: http://127.0.0.1:9/a.png"),
        ("<script>console.error('wrong')</script>", "console: "),
        ("<div style='width: 3000px'>wide</div>", "overflow: "),
    ],
)
def test_the_test_sees_what_is_wrong(browser, tmp_path, body, problem):
    (tmp_path / "page.html").write_text(f"<!doctype html><title>t</title>{body}")
    chromium.open_page(browser, tmp_path / "page.html", 400)
    assert any(found.startswith(problem) for found in chromium.problems(browser))
