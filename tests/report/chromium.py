"""A headless Chromium driven by selenium, without network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    """The browser's program, or ``None`` where it or its driver is missing."""
    return next(filter(None, map(shutil.which, NAMES)), None) if shutil.which("chromedriver") else None


@dataclass
class Page:
    """One tab."""

    driver: Chrome

    def open(self, path: Path, width: int, scheme: Literal["light", "dark"], height: int = 900) -> None:
        """Show a file at a width and in a colour scheme, and wait until it is loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.complaints(), self.requests()
        self.driver.get(path.resolve().as_uri())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        return self.driver.execute_script(f"return {expression.strip()}")

    def screenshot(self) -> bytes:
        """A PNG of what is in view."""
        return self.driver.get_screenshot_as_png()

    def complaints(self) -> list[str]:
        """Console messages and exceptions since this was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since this was last asked, the page's own included."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@contextmanager
def browser(program: str) -> Iterator[Page]:
    """A browser with a profile of its own, which ends with the block."""
    options = ChromeOptions()
    options.binary_location = program
    for option in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{option}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, ChromeService(shutil.which("chromedriver")))
    try:
        yield Page(driver)
    finally:
        driver.quit()
