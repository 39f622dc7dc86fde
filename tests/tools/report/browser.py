"""A headless Chromium that opens pages from disk, and what is wrong with a page."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def why_none() -> str:
    """Why there is no browser here; "" when there is one."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    if not any(map(shutil.which, BROWSERS)):
        return f"none of {', '.join(BROWSERS)} is installed (scripts/test.sh installs it for root)"
    return "" if shutil.which("chromedriver") else "chromedriver is not installed"


def start(profile: Path) -> Any:
    """A browser with a profile of its own, whose console and requests are recorded."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, Service(shutil.which("chromedriver")))


def open_page(browser: Any, page: Path, width: int) -> None:
    """Load a page from disk at a width in CSS pixels."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what an earlier page left
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


def problems(browser: Any) -> list[str]:
    """What is wrong with the page that is open."""
    found = []
    for entry in browser.get_log("browser"):
        if entry["level"] in ("SEVERE", "WARNING"):
            found.append(f"console: {entry['message']}")
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    urls += browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    found += [f"request: {url[:80]}" for url in urls if not url.startswith(("file://", "data:"))]
    for alt, width in browser.execute_script("return [...document.images].map(i => [i.alt, i.naturalWidth])"):
        if not width:
            found.append(f"image without a picture: {alt}")
        if not alt:
            found.append("image without alternative text")
    scroll, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    if scroll > inner:
        found.append(f"overflow: {scroll} of {inner} pixels")
    return found


def screenshot(browser: Any, path: Path) -> None:
    """The whole page as a PNG."""
    size = browser.execute_script(
        "return [document.documentElement.clientWidth, document.documentElement.scrollHeight]"
    )
    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(taken["data"]))
