"""Trainings that are killed, and what each kill cost: `python tests/slurm/kills.py --times 3`.

Everything is real: NeMo on the CPU, the script, the guard and Slurm. A run is killed, goes on, and ends. Then each of its
losses, learning rates, batches and validations is compared with those of a run that was not killed. The table goes into
docs/faults.md. Needs root and Slurm (slurm-cluster.sh install). A try takes one to three minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cluster import ROOT, Cluster, Desk
from training import Lines, Training, largest_difference, lines, repeated

PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- begin: python tests/slurm/kills.py -->\n", "<!-- end of kills -->\n"
REQUEUE = "requeue = true\n"


class Kill(NamedTuple):
    """One way to be interrupted."""

    what: str
    inject: Callable[[Training], int]  # the number of the run, which has ended
    gpus: int = 1
    site: str = ""
    walltime: str = "00:20:00"


def completed(training: Training, job: int) -> None:
    assert training.desk.ended(job, 400).state == "COMPLETED", training.desk.everything()


def resumed(training: Training, run: int, status: int) -> int:
    """The run has failed with this exit code; another job goes on."""
    assert training.desk.ended(run, 300).exit_code == status, training.desk.everything()
    completed(training, training.resume(run))
    return run


def killed(what: str, step: int, rank: int = 0) -> Callable[[Training], int]:
    def inject(training: Training) -> int:
        return resumed(training, training.submit(MOMENT=f"{what}:{step}:KILL:{rank}"), 137)

    return inject


def at_the_time_limit(training: Training) -> int:
    """Steps of ten seconds: Slurm warns the job 30 s before its limit of two minutes."""
    run = training.submit(STEP_S="10")
    completed(training, run)
    assert training.desk.job(run).restarts >= 1, training.desk.everything()
    return run


def requeued(training: Training) -> int:
    run = training.submit(STEP_S="1", WORKERS="1")
    training.until_step(run, 5)
    training.desk.cluster.call("scontrol", "requeue", run)
    completed(training, run)
    return run


def pre_empted(training: Training) -> int:
    desk = training.desk
    run = training.submit("--nodelist=node1", STEP_S="1", WORKERS="1")
    training.until_step(run, 5)
    above = ("--partition=other", "--nodelist=node1", "--gres=gpu:h100:8", "--wrap=sleep 1", "--output=/dev/null")
    desk.jobs.append(int(desk.cluster.call("sbatch", "--parsable", *above, cwd=desk.folder)))
    completed(training, run)
    assert desk.job(run).restarts == 1
    return run


def node_gone(training: Training) -> int:
    run = training.submit(STEP_S="1")
    training.until_step(run, 5)
    node = next(word for word in training.desk.job(run).text.split() if word.startswith("BatchHost=")).partition("=")[2]
    try:
        training.desk.cluster.kill_node(node)
        completed(training, run)
    finally:
        training.desk.cluster.start_node(node)
    return run


def disk_full(training: Training) -> int:
    """The disk fills up between two saves, and is emptied before the run goes on."""
    with small_disk(training.desk.stage):
        run = training.submit(STEP_S="2")
        training.until_step(run, 4)
        filler = training.desk.stage / "filler"
        free = shutil.disk_usage(training.desk.stage).free
        filler.write_bytes(b"0" * (free - (50 << 10)))
        assert training.desk.ended(run, 300).exit_code == 1, training.desk.everything()
        assert "ftgen: error: the checkpoint of step 6" in training.desk.log(run), training.desk.everything()
        filler.unlink()
        completed(training, training.resume(run))
        record(training, run)
    return run


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """In this block the folder is a disk of 40 MB, with what the folder had."""
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], check=True)
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def record(training: Training, run: int) -> None:
    """Copy what a run has recorded to the folder below its disk."""
    shutil.copytree(training.run_directory(run), training.desk.folder / "recorded")


def damaged(training: Training) -> int:
    """Killed; and the newest checkpoint is cut short, as a crash of the file system may do."""
    run = training.submit(MOMENT="step:8:KILL:0")
    training.desk.ended(run, 300)
    file = next((training.run_directory(run) / "checkpoints/step_6/weights").glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)
    return resumed(training, run, 137)


KILLS = (
    Kill("between two saves (step 5 of 12, saved every 3)", killed("step", 5)),
    Kill("the same, one of two tasks", killed("step", 5, rank=1), gpus=2),
    Kill("while the weights of step 6 are written", killed("weights", 6)),
    Kill("when the checkpoint of step 6 is complete, but for its name", killed("rename", 6)),
    Kill("when the checkpoint of step 6 has its name", killed("saved", 6)),
    Kill("after step 8, and the checkpoint of step 6 is cut short", damaged),
    Kill("Slurm's warning before the time limit", at_the_time_limit, walltime="00:02:00"),
    Kill("`scontrol requeue`, two tasks on two nodes", requeued, gpus=2),
    Kill("pre-empted by another job", pre_empted, site=REQUEUE),
    Kill("its node is gone (daemon and processes killed, node down)", node_gone, site=REQUEUE),
    Kill("the disk is full when step 6 is saved", disk_full),
)


class Tried(NamedTuple):
    """What one try came to."""

    repeated: int  # steps that were made twice
    difference: float  # the largest of a loss


def attempt(kill: Kill, desk: Desk, base: Training, expected: list[Lines]) -> Tried:
    """One try. AssertionError: the run did not end, or trained something else."""
    training = Training(desk, gpus=kill.gpus, site=kill.site, walltime=kill.walltime)
    for name in ("HF_ckpt", "data"):
        shutil.copytree(base.desk.stage / name, desk.stage / name)
    try:
        run = kill.inject(training)
        kept = desk.folder / "recorded"
        directory = kept if kept.exists() else training.run_directory(run)
        made = [lines(directory, rank) for rank in range(kill.gpus)]
        found = Tried(repeated(directory), max(map(largest_difference, made, expected)))
        assert made == expected, f"a loss differs by {found.difference:g}, or a batch, a learning rate"
        return found
    finally:
        desk.clear()


def row(kill: Kill, tried: list[Tried], failed: list[str]) -> str:
    again = sorted({each.repeated for each in tried})
    steps = f"{again[0]}–{again[-1]}" if len(again) > 1 else f"{again[0]}" if again else "–"
    difference = f"{max(each.difference for each in tried):g}" if tried else "–"
    return f"| {kill.what} | {len(tried) + len(failed)} | {steps} | {'; '.join(failed) or difference} |"


def table(times: int, words: list[str], log: Callable[[str], object]) -> str:
    rows = ["| where it was killed | times tried | steps made again | largest difference of a loss |", "|---|---|---|---|"]
    folder = Path(tempfile.mkdtemp(prefix="ftgen-kills-"))
    folder.chmod(0o755)
    # the nodes have mounts of their own: they see the small disk only below a mount that is shared
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "--make-shared", folder], check=True)
    (folder / "slurm").mkdir()
    cluster = Cluster(folder / "slurm")
    cluster.up()
    try:
        bases = {gpus: Training(Desk(cluster, folder / f"whole-{gpus}"), gpus=gpus) for gpus in (1, 2)}
        wholes = {gpus: base.whole() for gpus, base in bases.items()}
        expected = {gpus: [lines(whole, rank) for rank in range(gpus)] for gpus, whole in wholes.items()}
        for number, kill in enumerate(KILLS):
            if words and not any(word in kill.what for word in words):
                continue
            tried, failed = [], []
            for n in range(times):
                try:
                    desk = Desk(cluster, folder / f"{number}-{n}" / "desk")
                    tried.append(attempt(kill, desk, bases[kill.gpus], expected[kill.gpus]))
                except AssertionError as error:
                    failed.append((str(error).splitlines() or ["a check failed"])[0])
                    log(str(error))
            rows.append(row(kill, tried, failed))
            log(rows[-1])
    finally:
        cluster.down()
        subprocess.run(["umount", "--lazy", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], help="rows with this word")
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    arguments = parser.parse_args()
    made = table(arguments.times, arguments.only, lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(before + BEGIN + made + END + rest.split(END)[1], encoding="utf-8")
    else:
        print(made, end="")
    return int(any(not line.endswith("| 0 |") for line in made.splitlines()[2:]))


if __name__ == "__main__":
    sys.exit(main())
