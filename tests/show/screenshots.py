"""Pictures of a report for its page in the docs.

PYTHONPATH=tests python tests/show/screenshots.py docs/reports/gpus.html docs/images
"""

import base64
import subprocess
import sys
import tempfile
from pathlib import Path

from browser import chromium, show_as
from debian import program

SHOTS = {
    "report-light": {"width": 1100, "height": 1000},
    "report-dark": {"width": 1100, "height": 1000, "dark": True},
    "report-phone": {"width": 390, "height": 1000},
}


def main(report: Path, folder: Path) -> None:
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
        page = Path(profile, "print.pdf")
        page.write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"]))
        picture = [program("pdftoppm", "poppler-utils"), "-png", "-r", "60", "-f", "1", "-l", "1", "-singlefile"]
        subprocess.run([*picture, page, folder / "report-print"], check=True)
        browser.quit()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
