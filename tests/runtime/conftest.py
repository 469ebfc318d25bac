"""A STAGE_PATH for a test, or one that many share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from stages import Stage


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture(scope="session")
def make_stage(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Stage]:
    return lambda: Stage(tmp_path_factory.mktemp("stage"))
