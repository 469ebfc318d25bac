"""The documentation: every command in it works, as far as a machine without Slurm and without a GPU goes.

In a page, ```toml title="FILE"``` is written, and each `$ command` of ```console``` is run, in the page's order, in a folder
that has the repository's specs. A console block with a title of ELSEWHERE needs what is not here.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```console" in path.read_text())
BLOCK = re.compile(
    r'^(?P<indent> *)```(?P<kind>console|toml)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^ *```$', re.M | re.S
)
ELSEWHERE = {"on the cluster", "where the registry is", "once"}  # the package is installed once in tests/test_package.py


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
