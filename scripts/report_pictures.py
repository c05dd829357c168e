"""Make the pictures of a report in docs/media from published runs; needs Chromium, chromedriver and Selenium.

python scripts/report_pictures.py
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).parents[1]
RUNS, MEDIA = ROOT / "docs" / "results" / "pilot", ROOT / "docs" / "media"
COLOURS = 256
TO_TOP = """const section = document.querySelector(arguments[0]).closest("section");
window.scrollTo(0, section.getBoundingClientRect().top + window.scrollY - 70)"""
SECONDS = 300  # software rendering on a busy machine


class Picture(NamedTuple):
    """A file's name, the window's size, its theme, and what stands at its top; ``None`` for the page's own."""

    name: str
    width: int
    height: int
    theme: str
    top: str | None


PICTURES = (
    Picture("report-light", 1200, 1190, "light", None),
    Picture("report-dark", 1200, 1150, "dark", ".plot[id^=learning]"),
    Picture("report-phone", 420, 1300, "light", None),
)


def browser() -> Any:
    """Headless Chromium that draws WebGL without a graphics card."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("headless=new", "no-sandbox", "use-angle=swiftshader", "enable-unsafe-swiftshader", "hide-scrollbars",
                 "disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def take(driver: Any, page: Path, picture: Picture) -> None:
    """Open the page as the picture says and write what is seen."""
    theme = [{"name": "prefers-color-scheme", "value": picture.theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})
    size = {"width": picture.width, "height": picture.height, "deviceScaleFactor": 1, "mobile": picture.width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.as_uri())
    WebDriverWait(driver, SECONDS).until(
        lambda d: d.execute_script("return document.documentElement.dataset.ready === 'true'")
    )
    if picture.top:
        driver.execute_script(TO_TOP, picture.top)
        driver.execute_async_script("setTimeout(arguments[0], 2000)")
    seen = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    seen.quantize(COLOURS).save(MEDIA / f"{picture.name}.png", optimize=True)


def main() -> None:
    """Make the report, and every picture of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sphere_rl.cli", "report", str(RUNS), "--out", folder]
        subprocess.run(command, check=True)
        driver = browser()
        try:
            for picture in PICTURES:
                take(driver, Path(folder) / "index.html", picture)
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
