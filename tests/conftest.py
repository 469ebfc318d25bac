"""What every test shares: the command line as a process, golden files, and no skipping in CI."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
# What the environment brings, such as shellcheck, is found however pytest was called.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
Run = Callable[..., subprocess.CompletedProcess[str]]

# The same examples each time; `pytest tests/test_properties.py --hypothesis-profile=long` looks further, and elsewhere.
hypothesis.settings.register_profile("here", deadline=None, derandomize=True, max_examples=120, database=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("here"), phases=[hypothesis.Phase.generate])
hypothesis.settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the expected files anew")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where FTGEN_SKIP_IS_FAILURE is set, as in CI, a test that was not run has failed."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("FTGEN_SKIP_IS_FAILURE"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but everything must be run here: {report.longrepr}"


@pytest.fixture
def ftgen() -> Run:
    """Runs the real command line in a process of its own."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ftgen", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **{"cwd": ROOT, **options})

    return run


@pytest.fixture
def matches_golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compares a text with a file of expected text, or writes that file under --update-golden."""

    def compare(expected: Path, text: str) -> None:
        if request.config.getoption("--update-golden"):
            expected.write_text(text, encoding="utf-8")
        assert text == expected.read_text(encoding="utf-8")

    return compare
