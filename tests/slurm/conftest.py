"""A cluster for all tests of this folder, and a desk for each."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Desk
from debian import program

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "libpmix-dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes of eight fake GPUs."""
    program("slurmctld", *PACKAGES)
    if subprocess.run(["id", "-u"], capture_output=True, text=True, check=True).stdout.strip() != "0":
        pytest.skip("Slurm's daemons need root here")
    folder = Path(tempfile.mkdtemp(prefix="ftgen-slurm-"))  # pytest's own folders are closed to other users, and to munge
    folder.chmod(0o755)
    cluster = Cluster(folder)
    cluster.up()
    yield cluster
    cluster.down()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(cluster, tmp_path / "desk")
    yield desk
    desk.clear()


@pytest.fixture
def make_desk(cluster: Cluster, tmp_path: Path) -> Callable[[str], Desk]:
    return lambda name: Desk(cluster, tmp_path / name)
