"""The demo as a user meets it: the command is started, and Chromium asks."""

import json
import os
import signal
import subprocess
import sys

import pytest

from ..report import browser as chromium

pytest.importorskip("gradio", reason="gradio is not installed (the extra demo)")
NONE = chromium.why_none()
pytestmark = pytest.mark.skipif(bool(NONE), reason=NONE or "there is a browser")

BLUE = """
const [image] = document.querySelectorAll(arguments[0] + ' img'), canvas = document.createElement('canvas');
if (!image || !image.complete || !image.naturalWidth) return null;
canvas.width = canvas.height = 1;
canvas.getContext('2d').drawImage(image, 0, 0, 1, 1);
const [red, green, blue] = canvas.getContext('2d').getImageData(0, 0, 1, 1).data;
return blue - red;
"""


@pytest.fixture(scope="module")
def address(files):
    command = [sys.executable, "-m", "llava_patch", "demo", str(files.hf), "--device", "cpu", "--tokens", "6"]
    # Quoted for a browser on the same machine: no proxy in between.
    environment = {**os.environ, "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = next((line for line in process.stdout if line.startswith("open ")), "")
        assert line, process.communicate(timeout=60)
        yield line.split()[1]
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=120)
        assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said, said
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = chromium.start(tmp_path_factory.mktemp("profile"))
    yield started
    started.quit()


def test_both_answers_and_what_became_of_the_tokens(browser, address, picture, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    picture.save(tmp_path / "picture.png")
    browser.get(address)
    wait = WebDriverWait(browser, 240)

    def there(selector):
        return wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, selector))[0]

    def text(selector):
        return browser.execute_script(
            "const e = document.querySelector(arguments[0]); return e && (e.value || e.innerText)", selector
        )

    there("#image input[type=file]").send_keys(str(tmp_path / "picture.png"))
    there("#image img")
    question = there("#question textarea, #question input")
    question.clear()
    question.send_keys("Which word is it?")
    there("#ask").click()
    wait.until(lambda page: "first token" in (text("#times") or ""))
    assert "of 16 image tokens 16: all 6 layers" in text("#stock-words")
    assert "of 16 image tokens 16: layers 0-2, 5 of 6" in text("#patched-words")
    for which in ("stock", "patched"):
        assert (text(f"#{which}-answer textarea") or text(f"#{which}-answer input")).strip()
        assert "layer 5" in text(f"#{which}-mass")
        assert wait.until(lambda page: page.execute_script(BLUE, f"#{which}-attention") is not None)
    stock, routed = (wait.until(lambda page: [page.execute_script(BLUE, f"#{which}-tokens")])[0]
                     for which in ("stock", "patched"))  # fmt: skip
    assert routed > stock + 30  # the tokens' blue
    # Nothing was asked of another host.
    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    stopped = {m["params"]["requestId"] for m in log if m["method"] == "Network.loadingFailed"
               and m["params"].get("blockedReason") == "csp"}  # fmt: skip
    asked = [m["params"] for m in log if m["method"] == "Network.requestWillBeSent"]
    elsewhere = [r["request"]["url"] for r in asked if r["requestId"] not in stopped]
    own = address, address.replace("http", "ws"), "data:", "blob:", "about:", "chrome"
    assert [url for url in elsewhere if not url.startswith(own)] == []
