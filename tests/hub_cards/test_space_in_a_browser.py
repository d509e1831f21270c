# SPDX-License-Identifier: Apache-2.0
"""
The Space in a real Chromium without a window: upload, ask, see the number and the box, and nothing fetched from another host.

GEODE_SCREENSHOTS names a folder to keep pictures of the page in.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest

from tests.hub_cards.common_space import ROOM, write_archive


ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300  # software rendering of the figure takes most of it


@pytest.fixture
def browser():
    from selenium import webdriver

    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        script = (ROOT / "scripts" / "system_packages.sh").read_text()
        pytest.fail(f"This test needs Chromium and its driver. Run scripts/system_packages.sh as root:\n{script}")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",  # it cannot be had as root, and the page is our own
        "--disable-dev-shm-usage",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        "--window-size=1400,1440",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def wait_for(read, what: str):
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException

    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        try:
            found = read()
        except (NoSuchElementException, StaleElementReferenceException):  # not drawn yet, or being drawn again
            found = None
        if found:
            return found
        time.sleep(0.3)
    raise AssertionError(f"no {what} within {LIMIT_S} s")


def keep_screenshot(browser, name: str) -> None:
    if "GEODE_SCREENSHOTS" in os.environ:
        browser.save_screenshot(str(Path(os.environ["GEODE_SCREENSHOTS"]) / name))


@pytest.mark.slow
def test_visitor_uploads_asks_and_sees_the_number_and_the_box(browser, page, tmp_path):
    from selenium.webdriver.common.by import By

    def element(selector: str):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def replies() -> list[str]:
        # The time is the last line of an answer; a bubble without it says that one is coming.
        return [bubble.text for bubble in browser.find_elements(By.CSS_SELECTOR, "#chat .bot.message:has(sub)")]

    def picture() -> str:
        return element("#from-above img").get_attribute("src")

    def ask(question: str) -> str:
        count = len(replies())
        element("#question textarea, #question input").send_keys(question)
        element("#ask").click()
        return wait_for(lambda: len(replies()) > count and replies()[-1], f"answer to {question!r}")

    browser.get(page)
    wait_for(lambda: element("#encode"), "page")
    keep_screenshot(browser, "empty.png")
    element("#video input[type=file]").send_keys(str(ROOM / "room.mp4"))
    wait_for(lambda: "room" in element("#video").text, "uploaded video")
    element("#encode").click()
    message = wait_for(lambda: element(".toast-body, .toast-wrap").text, "message about the missing geometry")
    assert "no reconstructor" in message
    assert "/tmp" not in message
    assert element("#video").text.strip() != "Error"  # the message covers no input
    keep_screenshot(browser, "error.png")
    element("#geometry input[type=file]").send_keys(str(write_archive(tmp_path / "geometry.zip")))
    wait_for(lambda: "geometry" in element("#geometry").text.split("(.zip)")[-1], "uploaded geometry")
    element("#encode").click()
    wait_for(lambda: "is encoded" in element("#facts").text, "encoded room")
    before = wait_for(picture, "picture from above")
    number = ask("What is the length of the longest dimension of the armchair, measured in centimeters?")
    assert re.search(r"\d\.\d\d cm", number)
    assert " s" in number
    box = ask("Locate the sofa.")
    assert "Box 1" in box
    wait_for(lambda: picture() != before, "box in the picture")
    # plotly.js draws in space on a canvas, and the legend names what there is.
    wait_for(lambda: "box 1" in element("#in-space .legend").get_attribute("textContent"), "box in space")
    assert element("#in-space canvas").size["width"] > 300
    browser.execute_script("document.querySelector('.toast-close')?.click()")
    time.sleep(2)  # the canvas is painted after the legend
    keep_screenshot(browser, "answered.png")
    hosts = set()
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            address = urlparse(event["params"]["request"]["url"])
            hosts |= {address.netloc} if address.scheme in ("http", "https", "ws", "wss") else set()
    assert hosts == {urlparse(page).netloc}
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
