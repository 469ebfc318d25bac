"""The documentation: its commands work on a machine without Slurm and GPU, and its pages fit a phone.

The test of commands goes through a page in order, in a folder with the repository's specs. It writes each block
```toml title="FILE"```, and runs each `$ command` of a block ```console```, except in blocks with a title of ELSEWHERE.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
from browser import chromium, show_as

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```console" in path.read_text())
BLOCK = re.compile(
    r'^(?P<indent> *)```(?P<kind>console|toml)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^ *```$', re.M | re.S
)
# tests/cli/test_package.py installs the package, tests/runtime/test_show_data.py shows data
ELSEWHERE = {"on the cluster", "where the registry is", "once", "where the packages of the job are"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_every_command_of_a_page_works(page, tmp_path):
    shutil.copytree(ROOT / "specs", tmp_path / "specs")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for block in BLOCK.finditer(page.read_text()):
        text = "".join(line.removeprefix(block["indent"]) for line in block["text"].splitlines(keepends=True))
        if block["kind"] == "toml":
            tomli.loads(text)
            if block["title"]:
                (tmp_path / block["title"]).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / block["title"]).write_text(text)
        elif block["title"] not in ELSEWHERE:
            for command in re.findall(r"^\$ (.*)$", text, flags=re.M):
                done = subprocess.run(
                    ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
                )
                expected = 1 if block["title"] == "refused" else 0
                assert done.returncode == expected, f"{command}\n{done.stdout}{done.stderr}"
                assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation as a site, built from the pages here."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", folder]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 800, 1280])
def test_no_page_scrolls_sideways(site, browser, width):
    show_as(browser, width=width)
    for page in sorted(site.rglob("*.html")):
        if page.parent.name != "reports":  # tests/show/test_report.py looks at reports
            browser.get(page.as_uri())
            wide, window = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
            assert (wide, window) == (min(wide, width), width), page.relative_to(site)


@pytest.mark.browser
def test_the_tables_of_the_first_page_fit_a_phone(site, browser):
    show_as(browser, width=360)
    browser.get((site / "index.html").as_uri())
    assert browser.execute_script("return [...document.querySelectorAll('table, img')].map(e => e.offsetWidth)")
    assert browser.execute_script(
        "return [...document.querySelectorAll('table, img')].every(e => e.getBoundingClientRect().right <= innerWidth)"
    )
