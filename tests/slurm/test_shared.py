"""Two users of one group, with a umask of 022, share a STAGE_PATH; and folders and disks that nobody can write to."""

import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import HERE, Desk, until

SITE = 'convert = "task"\n'
GROUP, FIRST, SECOND = "ftgenlab", "ftgenfirst", "ftgensecond"


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def users() -> Iterator[None]:
    """Two users, each with a primary group of its own, and a group of both."""
    run("groupadd", "--force", GROUP)
    for user in (FIRST, SECOND):
        subprocess.run(["useradd", "--no-create-home", "--user-group", "--groups", GROUP, user], check=False)
    yield
    for user in (FIRST, SECOND):
        run("userdel", "--force", user)
    run("groupdel", "--force", GROUP)


@pytest.fixture
def group_desk(users: None, cluster) -> Iterator[Desk]:
    """A desk that both users reach, with a STAGE_PATH of their group, and Debian's Python for the stand-in."""
    folder = Path(tempfile.mkdtemp(prefix="ftgen-group-"))
    desk = Desk(cluster, folder / "desk")
    for path in (folder, desk.folder):
        path.chmod(0o755)
    shutil.copy(HERE / "program.py", desk.folder)
    desk.python.write_text(f'#!/bin/sh\nexec /usr/bin/python3 "{desk.folder}/program.py" "$@"\n')
    shutil.chown(desk.stage, group=GROUP)
    desk.stage.chmod(0o2775)
    for user in (FIRST, SECOND):
        (desk.folder / user).mkdir()
        shutil.chown(desk.folder / user, user)
    assert os.umask(0o022) == 0o022
    yield desk
    desk.clear()
    for user in (FIRST, SECOND):
        subprocess.run(["scancel", f"--user={user}"], env=cluster.environment, check=False)
    desk.quiet()
    shutil.rmtree(folder)


def submit(desk: Desk, user: str, *words: object, **environment: str) -> int:
    return desk.submit_in(["runuser", "-u", user, "--", "env", "-C", str(desk.folder / user)], *words, **environment)


def modes(desk: Desk) -> dict[str, str]:
    """Mode and group of everything below STAGE_PATH."""
    return {str(path): stat.filemode(path.lstat().st_mode) + " " + path.group() for path in desk.stage.rglob("*")}


def test_two_users_of_a_group_make_and_use_one_checkpoint(group_desk):
    script = group_desk.compile("spec", gpus=2, site=SITE)
    first = submit(group_desk, FIRST, script)
    assert group_desk.ended(first).state == "COMPLETED", group_desk.everything()
    found = modes(group_desk)
    assert {text.partition(" ")[2] for text in found.values()} == {GROUP}
    assert not [path for path, text in found.items() if not re.match("d.{3}rws|-.{3}rw", text)], found
    second = submit(group_desk, SECOND, script)
    assert group_desk.ended(second).state == "COMPLETED", group_desk.everything()
    assert len(group_desk.events("converted")) == 1
    manifest = group_desk.stage / "HF_ckpt/models/ftgen/tiny-llama/manifest.json"
    assert f'"user": "{FIRST}"' in manifest.read_text()
    # and a checkpoint that is damaged is replaced by whoever needs it
    (manifest.parent / "weights/last").write_bytes(b"short")
    third = submit(group_desk, SECOND, script)
    assert group_desk.ended(third).state == "COMPLETED", group_desk.everything()
    assert f'"user": "{SECOND}"' in manifest.read_text()


def test_a_user_takes_over_from_another_one_who_was_killed_and_is_told_who_that_is(group_desk):
    script = group_desk.compile("spec", site=SITE)
    first = submit(group_desk, FIRST, "--job-name=first", script, PROGRAM_CONVERT_S="60")
    until(lambda: group_desk.events("converting"), 30, group_desk.everything)
    second = submit(group_desk, SECOND, "--job-name=second", script)
    until(lambda: "waiting for" in group_desk.everything(), 30, group_desk.everything)
    group_desk.cluster.call("scancel", "--signal=KILL", "--full", first)
    assert group_desk.ended(second, 90).state == "COMPLETED", group_desk.everything()
    assert re.search(rf"process \d+ on node\d, Slurm job {first}, user {FIRST}, is building it", group_desk.log(second))
    place = group_desk.stage / "HF_ckpt/models/ftgen"
    assert {path.name for path in place.iterdir()} == {"tiny-llama", ".tiny-llama.claims"}  # the first one's half is removed


def test_a_folder_of_one_user_stays_so_and_another_user_is_told_whose_it_is(group_desk):
    """STAGE_PATH is opened to the group only after the first user has worked there."""
    shutil.chown(group_desk.stage, FIRST)
    group_desk.stage.chmod(0o755)
    script = group_desk.compile("spec", site=SITE)
    first = submit(group_desk, FIRST, script)
    assert group_desk.ended(first).state == "COMPLETED", group_desk.everything()
    assert not [path for path, text in modes(group_desk).items() if text[5] == "w"]  # his umask is left alone
    group_desk.stage.chmod(0o2775)
    second = submit(group_desk, SECOND, script)
    assert group_desk.ended(second).exit_code == 1
    folder = f"{group_desk.stage}/logs/experiments/sft_nemo_tiny_llama_fp32_1"
    said = (group_desk.folder / SECOND / f"sbatch_sft_nemo_tiny_llama_fp32_1_{second}.out").read_text()
    assert f"ftgen: error: you cannot write to {folder}, which belongs to {FIRST}:{FIRST} (drwxr-xr-x)\n" in said
    hint = f"ask {FIRST} to run: find {folder} -type d -user {FIRST} -exec chmod g+rwxs {{}} +. Or export STAGE_PATH="
    assert hint in said


def test_a_checkpoint_in_a_closed_folder_of_another_user_is_used_but_not_made(group_desk):
    """The logs are open, the checkpoints are not."""
    script, other = group_desk.compile("spec", site=SITE), group_desk.compile("other", site=SITE, source="random")
    first = submit(group_desk, FIRST, script)
    assert group_desk.ended(first).state == "COMPLETED", group_desk.everything()
    for path in (group_desk.stage / "HF_ckpt").rglob("*"):
        path.chmod(path.stat().st_mode & ~0o020)
    second = submit(group_desk, SECOND, script)
    assert group_desk.ended(second).state == "COMPLETED", group_desk.everything()
    third = submit(group_desk, SECOND, other)
    assert group_desk.ended(third).exit_code == 1
    log = group_desk.log(third)
    assert re.search(rf"ftgen: error: cannot create .*: Permission denied: \S+ belongs to {FIRST}\n", log)
    assert f"hint: ask {FIRST} to run: find " in log


def test_a_group_s_folder_without_setgid_is_warned_of(group_desk):
    group_desk.stage.chmod(0o775)
    first = submit(group_desk, FIRST, group_desk.compile("spec", site=SITE))
    assert group_desk.ended(first).state == "COMPLETED", group_desk.everything()
    (output,) = (group_desk.folder / FIRST).glob("sbatch_*.out")
    assert f"ftgen: warning: what this job makes in {group_desk.stage} does not get the folder's group {GROUP}: run " in (
        output.read_text()
    )


def test_where_slurm_cannot_write_its_output_file_a_job_ends_without_a_word(group_desk):
    """This is Slurm's doing, before the script begins: `ftgen doctor` warns of it, see test_doctor.py."""
    closed = group_desk.folder / "closed"
    closed.mkdir(mode=0o755)
    words = ["runuser", "-u", FIRST, "--", "env", "-C", str(closed)]
    job = group_desk.submit_in(words, group_desk.compile("spec", site=SITE))
    until(lambda: "Reason=JobLaunchFailure" in group_desk.job(job).text, 30, lambda: group_desk.job(job).text)
    assert not list(closed.iterdir())
    assert not list(group_desk.stage.iterdir())
