"""What goes wrong on the first day at a new site: the job says what to do, in its log and in Slurm's own output file."""

import re
import subprocess
from collections.abc import Callable, Iterator

import pytest
from cluster import SITE, Desk

TASK = 'convert = "task"\n'


def failed(desk: Desk, site: str, **environment: str) -> str:
    """The job's log; what it says of the failure is in Slurm's file too."""
    job = desk.submit(desk.compile("spec", site=site), **environment)
    ended = desk.ended(job)
    assert (ended.state, ended.exit_code) == ("FAILED", 1), desk.everything()
    log = desk.log(job)
    (error,) = re.findall(r"^ftgen: error: .*\n  hint: .*\n", log, re.MULTILINE)
    assert error in desk.output(job)
    assert desk.output(job).endswith("ftgen: exit status 1\n")
    return error


def test_a_site_without_modules(desk):
    error = failed(desk, TASK + 'modules = ["cuda/12.4"]\n')
    assert re.search(r"ftgen: error: .*module load cuda/12\.4", error)
    assert "hint: " in error


@pytest.fixture
def modules(desk: Desk) -> str:
    """A function `module` as sites have it: it reads variables that are not set, and its own commands fail."""
    start = desk.folder / "init.sh"
    start.write_text(
        "module() {\n"
        "    local found=$_NEVER_SET_ANYWHERE\n"
        "    false\n"
        '    if [ "$2" = "cuda/12.4" ]; then export CUDA_HOME=/opt/cuda$found; return 0; fi\n'
        '    echo "Lmod has detected the following error: the module $2 is unknown" >&2\n'
        "    return 1\n"
        "}\n"
        "export -f module\n"
    )
    env = subprocess.run(["bash", "-c", f". {start}; env"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"BASH_FUNC_module%%=(.*?\n\})", env, re.DOTALL)[0]


def test_a_module_of_a_careless_site_is_loaded(desk, modules):
    desk.python.write_text(desk.python.read_text().replace("exec", 'echo "CUDA: $CUDA_HOME"\nexec', 1))
    script = desk.compile("spec", site=TASK + 'modules = ["cuda/12.4"]\n')
    job = desk.submit(script, **{"BASH_FUNC_module%%": modules})
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    assert "CUDA: /opt/cuda\n" in desk.log(job)


def test_a_module_that_does_not_exist(desk, modules):
    error = failed(desk, TASK + 'modules = ["cuda/99"]\n', **{"BASH_FUNC_module%%": modules})
    assert re.search(r"ftgen: error: .*module load cuda/99", error)


def test_an_mpi_that_this_slurm_does_not_have(desk):
    error = failed(desk, SITE.replace('"none"', '"pmix_v9"') + TASK)
    assert "ftgen: error: this Slurm has no MPI type pmix_v9: MPI plugin types are... " in error
    assert "pmix_v4" in error
    assert 'hint: set mpi = "none" in the site profile' in error


def test_a_failure_without_an_error_of_ours_shows_the_last_lines_in_slurm_s_file(desk):
    desk.python.write_text('#!/bin/sh\necho "Traceback of a library"\nexit 7\n')
    job = desk.submit(desk.compile("spec", site=TASK))
    assert desk.ended(job).exit_code == 7
    assert "Traceback of a library\nftgen: exit status 7\nftgen: exit status 7\n" in desk.output(job)


@pytest.fixture
def small_disk(desk: Desk) -> Iterator[Callable[[str], None]]:
    """STAGE_PATH on node1 is a tmpfs of a size. Each node has mounts of its own."""
    node = (desk.cluster.folder / "run/node1.pid").read_text().strip()
    enter = ["nsenter", f"--target={node}", "--mount", "--"]
    yield lambda size: subprocess.run(
        [*enter, "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", desk.stage], check=True
    )
    subprocess.run([*enter, "umount", "--lazy", desk.stage], check=True)


# In 4 KiB, no folder is left for the log; 64 KiB end amid the runtime's files, and 300 KiB in the middle of the work.
@pytest.mark.parametrize("size", ["4k", "64k", "300k"])
def test_a_full_disk(desk, small_disk, size):
    script = desk.compile("spec", site=TASK)
    small_disk(size)
    job = desk.submit("--nodelist=node1", script)
    assert desk.ended(job).exit_code == 1, desk.everything()
    said = desk.output(job)
    assert re.search(r"ftgen: error: .*(disk .*is full|are free).*\n  hint: .*free some space", said, re.IGNORECASE), said
    assert said.endswith("ftgen: exit status 1\n")


def test_a_disk_that_fills_up_so_that_the_log_cannot_say_it(desk, small_disk):
    desk.python.write_text('#!/bin/bash\ndd if=/dev/zero of="$STAGE_PATH/fill" bs=4k 2>/dev/null\nseq 10000 || exit 5\n')
    script = desk.compile("spec", site=TASK)
    small_disk("2m")
    job = desk.submit("--nodelist=node1", script)
    assert desk.ended(job).exit_code == 5, desk.everything()
    assert f"ftgen: the disk of {desk.stage} is full: the log may not have all lines\n" in desk.output(job)
    assert desk.output(job).endswith("ftgen: exit status 5\n")
