"""The help: complete, whole sentences, and fast, because nothing heavy is imported for it."""

import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from ftgen.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = [[], *([name] for name in main.ftgen.commands)]
HEAVY = {"pydantic", "jinja2", "rich", "vl_convert", "torch", "tomli"}


def test_every_command_is_in_one_section():
    listed = [module.command.name for modules in main.SECTIONS.values() for module in modules]
    files = {path.stem for path in (ROOT / "ftgen/cli").glob("*.py")} - {"__init__", "main", "options", "completion"}
    assert len(listed) == len(set(listed))
    assert {name.replace("-", "_") for name in listed} == files
    assert set(listed) == set(main.ftgen.commands)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_line_of_the_help_is_cut(command, ftgen_process):
    done = ftgen_process(*command, "--help", env={"COLUMNS": "80", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    text = [line for line in done.stdout.splitlines() if not line.startswith("Usage: ")]  # "SPEC..." means several
    assert not [line for line in text if line.endswith(("...", "…"))]
    assert max(map(len, text)) <= 80


@pytest.mark.parametrize("name", main.ftgen.commands)
def test_every_option_has_a_sentence(name):
    options = [each for each in main.ftgen.commands[name].params if isinstance(each, click.Option)]
    assert not [each.name for each in options if not (each.help or "").endswith(".")]


def test_the_help_imports_nothing_heavy(ftgen_process):
    command = [sys.executable, "-X", "importtime", "-m", "ftgen", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not HEAVY & imported


def test_the_help_comes_at_once(ftgen_process):
    """It takes 0.1 s; the limit leaves room for a busy machine."""
    took = []
    for _ in range(5):
        start = time.monotonic()
        ftgen_process("--help")
        took.append(time.monotonic() - start)
    assert min(took) < 0.5, took
