"""What every test shares: the command line as a process, golden files, and no skipping in CI."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import hypothesis
import pytest

from ftgen.cli.main import main

ROOT = Path(__file__).parent.parent
# What the environment brings, such as shellcheck, is found however pytest was called.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
Run = Callable[..., subprocess.CompletedProcess[str]]

# The same examples each time; `pytest tests/test_properties.py --hypothesis-profile=long` looks further, and elsewhere.
# A busy machine makes examples slowly: that is no failure.
BUSY = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile(
    "here", deadline=None, derandomize=True, max_examples=120, database=None, suppress_health_check=BUSY
)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("here"), max_examples=10)  # make quick
hypothesis.settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the expected files anew")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups when collection ends
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep on one worker what shares a cluster, a browser, a checkpoint or a built package: see --dist loadgroup."""
    for item in items:
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail if the groups are not kept, as with a pytest that pytest-xdist does not know."""
    if hasattr(session.config, "workerinput") and session.config.getoption("loadgroup", False):
        lost = [item.nodeid for item in session.items if (group := _group(item)) and not item.nodeid.endswith(f"@{group}")]
        if lost:
            raise pytest.UsageError(f"pytest-xdist does not keep the groups of these tests: {lost[:3]}")


def _group(item: pytest.Item) -> str | None:
    """One group for Slurm, and one for each file whose tests share something that is slow to make."""
    if ROOT / "tests" / "slurm" in item.path.parents:
        return "slurm"
    shares = any(item.get_closest_marker(name) for name in ("runtime", "browser", "slow"))
    return item.path.stem if shares else None


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
    """Runs the command line within this process, which takes a tenth of the time of a new one."""

    def run(
        *arguments: object, cwd: str | Path = ROOT, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n", write_through=True)
        err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", "\n", write_through=True)
        command = ["ftgen", *map(str, arguments)]
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr(sys, "argv", command)
            patch.setattr(os, "environ", env or os.environ)
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code
        texts = (stream.buffer.getvalue().decode() for stream in (out, err))
        return subprocess.CompletedProcess(command, code, *texts)

    return run


@pytest.fixture
def ftgen_process() -> Run:
    """Runs the command line in a process of its own."""

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
