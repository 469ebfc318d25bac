"""Pictures of a report, or of the pages of a site, for the docs.

PYTHONPATH=tests python tests/show/screenshots.py docs/reports/gpus.html docs/images
PYTHONPATH=tests python tests/show/screenshots.py SITE docs/images EXPERIMENT.html
"""

import base64
import subprocess
import sys
import tempfile
from pathlib import Path

from browser import chromium, show_as
from debian import program
from selenium import webdriver

SHOTS = {
    "report-light": {"width": 1100, "height": 1000},
    "report-dark": {"width": 1100, "height": 1000, "dark": True},
    "report-phone": {"width": 390, "height": 1000},
}


SITE_SHOTS = {
    "site-index": ("index.html", {"width": 1100, "height": 900}),
    "site-trend": (None, {"width": 1100, "height": 900}),
    "site-phone": (None, {"width": 390, "height": 900}),
}


def main(report: Path, folder: Path, experiment: Path | None = None) -> None:
    """The pictures of a report; of a site, if a page of an experiment is given."""
    if experiment:
        of_site(report, folder, experiment)
    else:
        of_report(report, folder)


def of_site(site: Path, folder: Path, experiment: Path) -> None:
    """The index, an experiment with its trend, the same on a phone, and what the printer gets."""
    with tempfile.TemporaryDirectory() as profile:
        browser = chromium(Path(profile))
        for name, (page, look) in SITE_SHOTS.items():
            show_as(browser, **look)
            browser.get((site / (page or experiment)).resolve().as_uri())
            browser.save_screenshot(str(folder / f"{name}.png"))
        _print(browser, Path(profile), folder / "site-print")
        browser.quit()


def _print(browser: webdriver.Chrome, profile: Path, target: Path) -> None:
    """The first page that the printer gets."""
    page = profile / "print.pdf"
    page.write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"]))
    picture = [program("pdftoppm", "poppler-utils"), "-png", "-r", "60", "-f", "1", "-l", "1", "-singlefile"]
    subprocess.run([*picture, page, target], check=True)


def of_report(report: Path, folder: Path) -> None:
    """The top of the page in light and on a phone, one run of it in dark, and what the printer gets."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        browser = chromium(Path(profile))
        for name, look in SHOTS.items():
            show_as(browser, **look)
            browser.get(report.resolve().as_uri())
            if name == "report-dark":
                browser.execute_script("document.querySelector('article').scrollIntoView()")
            browser.save_screenshot(str(folder / f"{name}.png"))
        _print(browser, Path(profile), folder / "report-print")
        browser.quit()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
