"""Faults, injected into the real guard and a real Slurm, and what each one cost: `python tests/slurm/faults.py --times 5`.

Every fault ends with jobs or processes that need the checkpoint, and with a look at what they used: every rank that
trains reads every byte of it. NeMo, the download and the training are stand-ins (program.py); the script, the
entrypoint, the guard and Slurm are not. The table goes into docs/faults.md. Needs root, Slurm (slurm-cluster.sh
install) and Debian's faketime.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cluster import HERE, ROOT, Cluster, Desk, until

TASK = 'convert = "task"\n'
PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- begin: python tests/slurm/faults.py -->\n", "<!-- end -->\n"
ANOTHER = {"FTGEN_HOST": "elsewhere"}  # a process there cannot be looked at: only its heartbeat tells
STALE_S = 6.0  # in these tests; 60 in a job


class Outcome(NamedTuple):
    """What one try came to."""

    conversions: int  # that ended well
    taken_over_s: float | None  # from the fault to the next owner's start
    said: str = ""  # the line that the user reads


class Fault(NamedTuple):
    """Something to inject."""

    what: str
    inject: Callable[[Desk], Outcome]
    conversions: int = 1


def start(desk: Desk, command: str = "convert", *, wrap: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    """The entrypoint's command as a process of this machine, without Slurm; "use" converts and then trains as one rank."""
    code = desk.folder / "code"
    if not code.exists():
        subprocess.run(["bash", desk.compile("spec", site=TASK), "--unpack", code], check=True)
    program = f'"{sys.executable}" "{HERE / "program.py"}" "{code}/spec.py"'
    script = f"exec {program} {command}" if command != "use" else f"{program} convert && exec {program} finetune"
    own = {"STAGE_PATH": str(desk.stage), "FTGEN_STALE_S": str(STALE_S), "RANK": "0", "MASTER_PORT": "1"}
    return subprocess.Popen(
        [*wrap, "bash", "-c", script],
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=120)[0]
    return process.returncode, said


def use(desk: Desk, **environment: str) -> str:
    """A process that needs the checkpoint gets it; what it said."""
    status, said = finish(start(desk, "use", PROGRAM_TRAIN_S="0", **environment))
    assert status == 0, said
    return said


def taken_over(desk: Desk, since: float) -> float:
    """Seconds from `since` to the next start of a download."""
    begun = [float(line.split()[0]) for line in desk.events("download") if float(line.split()[0]) > since]
    return begun[0] - since


def outcome(desk: Desk, taken_over_s: float | None = None, said: str = "") -> Outcome:
    """What was lost, if anything: asserted here for every fault."""
    trained = desk.events("train:")
    assert trained, desk.everything()
    assert not [line for line in trained if "PARTIAL" in line], trained
    place = desk.stage / "HF_ckpt/models/ftgen"
    left = {path.name for path in place.iterdir()} - {"tiny-llama", ".tiny-llama.claims"}
    assert not [name for name in left if "untrusted" not in name], left
    return Outcome(len(desk.events("converted")), taken_over_s, said)


def line_of(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def together(desk: Desk) -> Outcome:
    script = desk.compile("spec", site=TASK)
    jobs = [desk.submit(f"--job-name=c{n}", script, PROGRAM_TRAIN_S="0", PROGRAM_CONVERT_S="4") for n in range(16)]
    processes = [start(desk, "use", PROGRAM_TRAIN_S="0", PROGRAM_CONVERT_S="4") for _ in range(16)]
    for process in processes:
        status, said = finish(process)
        assert status == 0, said
    assert {desk.ended(job, 120).state for job in jobs} == {"COMPLETED"}, desk.everything()
    assert len(desk.events("download")) == 1
    return outcome(desk)


def killed(desk: Desk, **environment: str) -> Outcome:
    """SIGKILL of the one that converts, while another waits."""
    holder = start(desk, PROGRAM_CONVERT_S="60", **environment)
    until(lambda: desk.events("converting"), 30)
    waiter = start(desk, "use", PROGRAM_TRAIN_S="0")
    time.sleep(1)
    os.killpg(holder.pid, signal.SIGKILL)
    since = time.time()
    holder.communicate()
    status, said = finish(waiter)
    assert status == 0, said
    return outcome(desk, taken_over(desk, since))


def killed_elsewhere(desk: Desk) -> Outcome:
    return killed(desk, **ANOTHER)


def clock(desk: Desk) -> Outcome:
    """The holder's clock is an hour ahead, and it dies on a machine that cannot be looked at."""
    holder = start(desk, wrap=("faketime", "-f", "+1h"), PROGRAM_CONVERT_S="60", **ANOTHER)
    until(lambda: desk.events("converting"), 60)
    waiter = start(desk, "use", PROGRAM_TRAIN_S="0")
    time.sleep(1)
    assert waiter.poll() is None  # the clock alone does not make it take over
    os.killpg(holder.pid, signal.SIGKILL)
    since = time.time()
    holder.communicate()
    status, said = finish(waiter)
    assert status == 0, said
    begun = min(float(line.split()[0]) for line in desk.events("download") if abs(float(line.split()[0]) - since) < 1800)
    return outcome(desk, begun - since)


def in_slurm(desk: Desk, fault: Callable[[int], object], *options: str, requeue: str = "false") -> Outcome:
    """A job that converts, another that waits on another node, and the fault."""
    holder_script = desk.compile("holder", site=TASK + f"requeue = {requeue}\n")
    waiter_script = desk.compile("waiter", site=TASK)
    holder = desk.submit("--job-name=holder", "--nodelist=node1", *options, holder_script, PROGRAM_CONVERT_S="20")
    until(lambda: desk.events("converting"), 30, desk.everything)
    waiter = desk.submit("--job-name=waiter", "--nodelist=node2", waiter_script, PROGRAM_CONVERT_S="1", PROGRAM_TRAIN_S="0")
    until(lambda: "waiting for" in desk.everything(), 30, desk.everything)
    since = time.time()
    fault(holder)
    assert desk.ended(waiter, 120).state == "COMPLETED", desk.everything()
    taken = taken_over(desk, since)
    desk.quiet()
    return outcome(desk, taken, line_of(desk.log(waiter), "waiting for"))


def cancelled(desk: Desk) -> Outcome:
    return in_slurm(desk, lambda job: desk.cluster.call("scancel", job))


def requeued(desk: Desk) -> Outcome:
    return in_slurm(desk, lambda job: desk.cluster.call("scontrol", "requeue", job), requeue="true")


def node_gone(desk: Desk) -> Outcome:
    try:
        return in_slurm(desk, lambda _: desk.cluster.kill_node("node1"))
    finally:
        desk.cluster.start_node("node1")


@contextmanager
def small_disk(desk: Desk, size: str) -> Iterator[Path]:
    """STAGE_PATH on a file system of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", desk.stage], check=True)
    try:
        yield desk.stage
    finally:
        subprocess.run(["umount", "-l", desk.stage], check=True)


def remount(desk: Desk, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", desk.stage], check=True)


def full_disk(desk: Desk) -> Outcome:
    with small_disk(desk, "74m"):  # enough by the estimate, and then it is filled
        holder = start(desk, PROGRAM_CONVERT_S="4")
        until(lambda: desk.events("converting"), 30)
        with (desk.stage / "filler").open("wb") as filler:
            try:
                while True:
                    filler.write(b"0" * (1 << 16))
                    filler.flush()
            except OSError:
                pass
        status, said = finish(holder)
        assert status == 1, said
        assert "Traceback" not in said, said
        (desk.stage / "filler").unlink()
        use(desk)
        return outcome(desk, said=line_of(said, "ftgen: error:"))


def no_room(desk: Desk) -> Outcome:
    with small_disk(desk, "20m"):
        status, said = finish(start(desk))
        assert status == 1, said
        assert "Traceback" not in said, said
        remount(desk, "size=200m")
        use(desk)
        return outcome(desk, said=line_of(said, "ftgen: error:"))


def read_only(desk: Desk) -> Outcome:
    with small_disk(desk, "200m"):
        remount(desk, "ro")
        status, said = finish(start(desk))
        assert status == 1, said
        assert "Traceback" not in said, said
        remount(desk, "rw")
        use(desk)
        return outcome(desk, said=line_of(said, "ftgen: error:"))


def place(desk: Desk) -> Path:
    return desk.stage / "HF_ckpt/models/ftgen/tiny-llama"


def truncated(desk: Desk) -> Outcome:
    use(desk)
    os.truncate(place(desk) / "weights/last", 1000)
    return outcome(desk, said=line_of(use(desk), "is not used"))


def flipped(desk: Desk) -> Outcome:
    """A byte of a large file, its size and time unchanged: only reading all of it tells."""
    use(desk)
    file = place(desk) / "weights/last"
    times = file.stat()
    with file.open("r+b") as opened:
        opened.seek(1 << 20)
        opened.write(b"X")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    status, said = finish(start(desk, "verify"))
    assert status == 1, said
    use(desk)
    return outcome(desk, said=line_of(said, "cannot be used"))


def another_manifest(desk: Desk) -> Outcome:
    use(desk)
    manifest = place(desk) / "manifest.json"
    document = json.loads(manifest.read_text())
    document["source"]["revision"] = "another"
    manifest.write_text(json.dumps(document))
    return outcome(desk, said=line_of(use(desk), "is not used"))


def no_manifest(desk: Desk) -> Outcome:
    """What NeMo's own importer leaves when it is killed, and takes for a checkpoint ever after."""
    (place(desk) / "weights").mkdir(parents=True)
    (place(desk) / "weights/half").write_bytes(b"1")
    return outcome(desk, said=line_of(use(desk), "is not used"))


FAULTS = (
    Fault("16 jobs and 16 processes start together", together),
    Fault("the one that converts is killed (SIGKILL), on the same machine", killed),
    Fault("the same on another machine, which only its heartbeat tells of", killed_elsewhere),
    Fault("the same, with its clock an hour ahead", clock),
    Fault("its job is cancelled", cancelled),
    Fault("its job is requeued, and runs again beside the others", requeued),
    Fault("its node is gone (daemon and processes killed, node down)", node_gone),
    Fault("too little room on the disk", no_room),
    Fault("the disk fills up in the middle", full_disk),
    Fault("the directory cannot be written to", read_only),
    Fault("a weight file is cut short", truncated, 2),
    Fault("a byte of a weight file is flipped, size and time unchanged", flipped, 2),
    Fault("the manifest is of another checkpoint", another_manifest, 2),
    Fault("a half-made checkpoint that another program left", no_manifest),
)


def attempt(cluster: Cluster, fault: Fault, folder: Path) -> Outcome:
    """One try in a folder of its own; AssertionError says what was lost."""
    desk = Desk(cluster, folder)
    try:
        found = fault.inject(desk)
        assert found.conversions == fault.conversions, f"{found.conversions} conversions, not {fault.conversions}"
        return found
    finally:
        if desk.jobs:
            desk.clear()


def row(fault: Fault, tried: list[Outcome], lost: list[str]) -> str:
    times = [found.taken_over_s for found in tried if found.taken_over_s is not None]
    took = f"{min(times):.1f}–{max(times):.1f} s" if times else "–"
    said = next((found.said for found in tried if found.said), "").split("ftgen: ", 1)[-1]
    for path in (str(folder) for found in tried for folder in [found.said.split("/desk")[0]] if "/desk" in found.said):
        said = said.replace(path[path.find("/") :] + "/desk", "")
    return f"| {fault.what} | {len(tried) + len(lost)} | {'; '.join(lost) or 'nothing'} | {took} | {said} |"


def table(times: int, log: Callable[[str], object]) -> str:
    rows = ["| fault | times tried | what was lost | another took over after | what it says |", "|---|---|---|---|---|"]
    folder = Path(tempfile.mkdtemp(prefix="ftgen-faults-"))
    folder.chmod(0o755)
    cluster = Cluster(folder / "slurm")
    (folder / "slurm").mkdir()
    cluster.up()
    try:
        for number, fault in enumerate(FAULTS):
            tried, lost = [], []
            for n in range(times):
                try:
                    tried.append(attempt(cluster, fault, folder / f"{number}-{n}" / "desk"))
                except AssertionError as error:
                    lost.append((str(error).splitlines() or ["a check failed"])[0])
                    log(str(error))
            rows.append(row(fault, tried, lost))
            log(rows[-1])
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    arguments = parser.parse_args()
    made = table(arguments.times, lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(before + BEGIN + made + END + rest.split(END)[1], encoding="utf-8")
    else:
        print(made, end="")
    return int("| nothing |" not in made)


if __name__ == "__main__":
    sys.exit(main())
