"""What a user says on sbatch's command line holds for the conversion job, the run after it, and the scripts after that."""

import re

import pytest
from cluster import Desk, until

TWO = "gpus_per_node = 2\n"
FIELD = r"(?:^|\s){}=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)"


def field(text: str, name: str) -> str:
    return re.findall(FIELD.format(re.escape(name)), text, re.MULTILINE)[0]


def queued(desk: Desk, *words: str, scripts: list) -> tuple[int, int, int]:
    """The first run has submitted all others: numbers of the conversion, of the copy and of the second script's job."""
    first = desk.submit(*words, *scripts, PROGRAM_CONVERT_S="0.2", PROGRAM_TRAIN_S="0")
    assert desk.ended(first).state == "COMPLETED", desk.everything()
    return first + 1, first + 2, first + 3


@pytest.fixture
def scripts(desk: Desk) -> list:
    return [desk.compile(name, gpus=4, site=TWO) for name in ("a", "b")]


def test_an_excluded_node_is_not_used_by_any_job(desk, scripts):
    queued(desk, "--exclude=node1,node3", scripts=scripts)
    desk.quiet()
    hosts = {line.split()[1]: line.split()[3] for line in desk.events()}
    assert {"converting", "train:0:trusted", "train:3:trusted"} <= hosts.keys(), desk.everything()
    assert set(hosts.values()) == {"node2", "node4"}


# Option, field of the record, value there, and whether the conversion job has it. (A QOS needs slurmdbd.)
WORDS = {
    "--account=project": ("Account", "project", True),
    "--partition=other": ("Partition", "other", True),
    "--constraint=lab": ("Features", "lab", True),
    "--licenses=lab:2": ("Licenses", "lab:2", True),
    "--nice=7": ("Nice", "7", True),
    "--mail-type=FAIL": ("MailType", "FAIL", True),
    "--mail-user=me@example.org": ("MailUser", "me@example.org", True),
    "--comment=for the paper": ("Comment", "for the paper", True),
    "--time=00:07:00": ("TimeLimit", "00:07:00", False),
    "--deadline=now+2days": ("Deadline", None, True),
    "--no-requeue": ("Requeue", "0", True),
    "--mem=2G": ("MinMemoryNode", "2G", True),
    "--cpus-per-task=2": ("CPUs/Task", "2", True),
    "--tmp=1": ("MinTmpDiskNode", "1M", True),
    "--gres=gpu:h100:2": ("TresPerNode", "gres:gpu:h100:2", False),
    "--switches=1@5": ("Switches", "1@00:05:00", False),
    "--job-name=mine": ("JobName", "mine", True),
    "--threads-per-core=1": ("ReqB:S:C:T", "0:0:*:1", True),
}


def test_every_word_is_carried_on_or_named(desk, scripts):
    convert, copy, second = queued(desk, *WORDS, scripts=scripts)
    first = desk.job(convert - 1).text
    texts = {number: desk.job(number).text for number in (convert, copy, second)}
    for option, (name, value, of_conversion) in WORDS.items():
        wanted = field(first, name) if value is None else value
        for number in (copy, second):
            assert field(texts[number], name) == wanted, (option, texts[number])
        in_conversion = field(texts[convert], name) if f"{name}=" in texts[convert] else "nothing"
        if name == "JobName":
            assert in_conversion == "mine_convert"
        elif of_conversion:
            assert in_conversion == wanted, (option, texts[convert])
        else:
            assert in_conversion != wanted, (option, texts[convert])
            word = option.partition("=")[0]
            assert f"ftgen: {word}=" in desk.output(convert - 1)
    said = re.findall(r"^ftgen: (--\S+) of this job does not hold for (.*?): (.*)$", desk.output(convert - 1), re.MULTILINE)
    reason = "it has one node, one task, at most one GPU, and the time limit convert_walltime"
    assert {(word.partition("=")[0], of, why) for word, of, why in said} == {
        (word, "the conversion job", reason) for word in ("--time", "--gres", "--switches")
    }
    desk.quiet()


def test_output_error_and_folder_are_those_of_the_user_with_each_job_s_own_number(desk, scripts):
    (desk.folder / "out").mkdir()
    where = f"--chdir={desk.folder}/out"
    jobs = queued(desk, where, "--output=user %j.txt", f"--error={desk.folder}/user_%j.err", scripts=scripts)
    desk.quiet()
    for job in (jobs[0] - 1, *jobs):
        assert field(desk.job(job).text, "StdOut") == f"{desk.folder}/out/user {job}.txt"
        assert field(desk.job(job).text, "StdErr") == f"{desk.folder}/user_{job}.err"
        assert "ftgen: log: " in (desk.folder / f"out/user {job}.txt").read_text()
    assert not list(desk.folder.rglob("sbatch_*.out"))


def test_a_folder_with_the_number_of_the_job_is_that_of_all_jobs(desk, scripts):
    number = int(desk.cluster.call("sbatch", "--parsable", "--output=/dev/null", "--wrap=true")) + 1
    (desk.folder / f"gw{number}").mkdir()
    jobs = queued(desk, f"--output={desk.folder}/gw{number}/user %j.txt", scripts=scripts)
    desk.quiet()
    assert jobs[0] - 1 == number
    for job in (number, *jobs):
        assert field(desk.job(job).text, "StdOut") == f"{desk.folder}/gw{number}/user {job}.txt"
        assert "ftgen: log: " in (desk.folder / f"gw{number}/user {job}.txt").read_text()


def test_a_list_of_nodes_goes_to_runs_of_as_many_nodes(desk):
    scripts = [desk.compile("a", gpus=4, site=TWO), desk.compile("b", gpus=4, site=TWO), desk.compile("c", gpus=2, site=TWO)]
    convert, copy, second = queued(desk, "--nodelist=node[3-4]", scripts=scripts)
    until(lambda: "3 of 3" in desk.output(convert - 1), 20, desk.everything)
    lists = [field(desk.job(job).text, "ReqNodeList") for job in (convert, copy, second, second + 1)]
    assert lists == ["(null)", "node[3-4]", "node[3-4]", "(null)"]
    said = desk.output(convert - 1)
    assert "ftgen: --nodelist=node3,node4 of this job does not hold for the conversion job: it has one node\n" in said
    assert "ftgen: --nodelist=node3,node4 of this job does not hold for c.sh: it has another number of nodes\n" in said
    desk.quiet()


def test_a_list_of_one_node_goes_to_the_conversion_too(desk):
    convert, copy, _ = queued(desk, "--nodelist=node3", scripts=[desk.compile("a", gpus=2, site=TWO), desk.compile("b")])
    assert {field(desk.job(job).text, "ReqNodeList") for job in (convert, copy)} == {"node3"}
    desk.quiet()


def test_what_slurm_fills_in_is_not_taken_for_the_user_s_word(desk):
    """The second script has a partition, memory and comment of its own. It gets what it would get alone."""
    first = desk.compile("a", gpus=2, site=TWO)
    other = 'partition = "other"\nmem = "700"\nsbatch_flags = ["--comment=own", "--licenses=lab"]\n'
    second = desk.compile("b", gpus=2, site=other + TWO + 'gpu_request = "gres"\nmpi = "none"\nexclusive = false\n')
    number = desk.submit("--hold", second)
    alone = desk.job(number).text.split()
    desk.cluster.call("scancel", number)
    convert, copy, job = queued(desk, scripts=[first, second])
    unlike = ("Id", "Time", "Priority", "State", "Reason", "Dependency", "Std", "NodeList", "SchedEval", "TRES", "BatchHost")
    pairs = zip(alone, desk.job(job).text.split(), strict=False)
    differ = [(a, b) for a, b in pairs if a != b and "=" in a and not any(word in a for word in (*unlike, "Sid"))]
    assert differ == []
    assert "does not hold" not in desk.output(convert - 1)
    assert field(desk.job(copy).text, "Partition") == "main"
    desk.quiet()


def test_a_word_that_contradicts_the_header_of_another_script_wins_as_it_would_alone(desk):
    """Time limits of the two specs differ; the command line has one for both. The memory is a matter of each script."""
    scripts = [desk.compile("a", gpus=2, site=TWO), desk.compile("b", gpus=2, site=TWO, walltime="00:20:00")]
    own = 'mem = "700"\n' + TWO + 'gpu_request = "gres"\nmpi = "none"\nexclusive = false\n'
    scripts.append(desk.compile("c", gpus=2, site=own))
    convert, _, second = queued(desk, "--time=00:05:00", "--mem=1500", scripts=scripts)
    until(lambda: "3 of 3" in desk.output(convert - 1), 20, desk.everything)
    assert [field(desk.job(job).text, "TimeLimit") for job in (second, second + 1)] == ["00:05:00"] * 2
    assert [field(desk.job(job).text, "MinMemoryNode") for job in (second, second + 1)] == ["1500M", "700M"]
    assert (
        "ftgen: --mem=1500M of this job does not hold for c.sh: its header has 700M, that of this job 1000M\n"
        in desk.output(convert - 1)
    )
    desk.quiet()


def test_a_reservation_is_carried_on(desk, scripts):
    call = desk.cluster.call
    call(
        "scontrol",
        "create",
        "reservation",
        "reservationname=lab",
        "users=root",
        "starttime=now",
        "duration=10",
        "nodes=node[3-4]",
    )
    try:
        jobs = queued(desk, "--reservation=lab", scripts=scripts)
        assert {field(desk.job(job).text, "Reservation") for job in jobs} == {"lab"}
        desk.quiet()
    finally:
        desk.clear()
        call("scontrol", "delete", "reservationname=lab")
