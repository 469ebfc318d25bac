"""Ranks, GPUs, statuses: what each task of a job finds, and what the job makes of a task's failure."""

import re

import pytest
from cluster import SITE, Desk, until


def table(desk: Desk, job: int) -> dict[int, list[str]]:
    """What each rank printed, by rank."""
    return {int(rank): rest.split() for rank, rest in re.findall(r"^rank (\d+): (.*)$", desk.log(job), re.MULTILINE)}


def run(desk: Desk, gpus: int, site: str = "", **environment: str) -> int:
    job = desk.submit(desk.compile("spec", gpus=gpus, site='convert = "task"\n' + site), **environment)
    desk.ended(job, 90)
    return job


@pytest.mark.parametrize(("gpus", "nodes"), [(8, 1), (16, 2), (32, 4)])
def test_each_rank_knows_its_place(desk, gpus, nodes):
    # what the submitting shell had, of an earlier run or of a container, must not be taken for this one's
    stale = {
        "RANK": "7",
        "LOCAL_RANK": "7",
        "WORLD_SIZE": "99",
        "NODE_RANK": "5",
        "MASTER_ADDR": "elsewhere",
        "MASTER_PORT": "1",
    }
    job = run(desk, gpus, **stale)
    assert desk.job(job).state == "COMPLETED", desk.everything()
    ranks = table(desk, job)
    assert sorted(ranks) == list(range(gpus))
    first = ranks[0]
    assert len({hosts[6] for hosts in ranks.values()}) == nodes
    for rank, found in ranks.items():
        local, node, world, local_world, address, port, host, visible = found
        assert (int(local), int(node)) == (rank % 8, rank // 8)
        assert (world, local_world, visible) == (str(gpus), "8", "8")
        assert address == first[6]  # the host of rank 0
        assert port == first[5]
        assert host == ranks[rank // 8 * 8][6]
    assert 20000 <= int(first[5]) < 32768


@pytest.mark.parametrize(
    "request_",
    ['gpu_request = "gres"\ngpu_type = "h100"\n', 'gpu_request = "gpus-per-node"\n', 'gpu_request = "none"\n'],
    ids=lambda text: "-".join(re.findall('"(.*?)"', text)),
)
def test_gpus_are_asked_for_as_the_site_wants_it(desk, request_):
    job = run(desk, 2, request_ + "gpus_per_node = 2\n" + SITE.partition("\n")[2])
    assert desk.job(job).state == "COMPLETED", desk.everything()
    visible = {found[7] for found in table(desk, job).values()}
    assert visible == ({"1"} if "none" in request_ else {"2"})  # "1": CUDA_VISIBLE_DEVICES is not set


@pytest.mark.parametrize("mpi", ["pmi2", "pmix"])
def test_ranks_start_with_every_kind_of_mpi(desk, mpi):
    job = run(desk, 2, SITE.replace('"none"', f'"{mpi}"'))
    assert sorted(table(desk, job)) == [0, 1], desk.everything()


@pytest.mark.parametrize(("mode", "status"), [("status", 42), ("segfault", 139)])
def test_the_status_is_that_of_the_first_rank_that_failed_and_the_others_are_ended(desk, mode, status):
    job = run(desk, 16, "gpus_per_node = 8\n", PROGRAM_MODE=mode)
    ended = desk.job(job)
    assert (ended.state, ended.exit_code) == ("FAILED", status), desk.everything()
    log = desk.log(job)
    assert log.endswith(f"ftgen: exit status {status}\n")
    assert re.search(r"srun: error: node\d: task 3: ", log)
    assert not desk.events("trained")


def test_every_rank_s_failure_is_in_the_log_under_its_name(desk):
    job = run(desk, 16, "gpus_per_node = 8\n", PROGRAM_MODE="raise")
    assert desk.job(job).exit_code == 1
    failed = re.findall(
        r"^\[rank (\d+) on (node\d)\] RuntimeError: CUDA error on device (\d+)$", desk.log(job), re.MULTILINE
    )
    # those that had not come so far when the first one failed are ended by Slurm, which says so
    assert failed
    assert all(rank == device for rank, _, device in failed)


def test_variables_that_override_the_header_are_warned_of(desk):
    environment = {"SBATCH_TIMELIMIT": "5", "SBATCH_GRES": "gpu:3", "SBATCH_GPUS_PER_TASK": "1", "SBATCH_PARTITION": "other"}
    job = run(desk, 1, 'partition = "main"\n', **{k: v for k, v in environment.items() if k != "SBATCH_GPUS_PER_TASK"})
    log = desk.log(job)
    assert (
        "ftgen: warning: SBATCH_TIMELIMIT=5 from the shell that submitted the job overrides this script (00:10:00)\n" in log
    )
    assert "SBATCH_GRES=gpu:3 from the shell that submitted the job overrides this script (gpu:1)" in log
    assert "SBATCH_PARTITION=other from the shell that submitted the job overrides this script (main)" in log
    assert log.count("warning") == 3
    text = desk.job(job).text  # and so they do
    assert "TimeLimit=00:05:00" in text
    assert "Partition=other" in text
    assert "gpu:3" in text


def test_the_port_of_another_program_is_left_alone(desk):
    import socket

    with socket.socket() as taken:
        number = desk.submit("--hold", desk.compile("spec", site='convert = "task"\n'))
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 20000 + number % 10000))
        taken.listen()
        desk.cluster.call("scontrol", "release", number)
        desk.ended(number)
    assert table(desk, number)[0][5] == str(20001 + number % 10000)
    until(lambda: not desk.queue(), 10)
