"""Who may build a thing: numbered claims on a shared file system. In: a directory of claims. Out: the right to build.

Claim n is the directory `<claims>/<n>`; the highest number is the current one, and taking over from n is `mkdir n+1`,
which exactly one process can do anywhere (file locks succeed for everyone on many cluster file systems). No claim is
ever deleted, so that a number never means two owners. A claim holds

    owner.json   who has it: host, boot, pid namespace, pid and its start time, Slurm job and restart
    heartbeat    a counter that its owner raises every few seconds
    released     there once the owner is through, well or not

An owner counts as dead as soon as somebody can tell: its process is gone from this machine, or Slurm says that its job
has ended; and in any case when its heartbeat stands still, by the clock of the one who waits: clocks differ between
machines, so no time that another one wrote is ever compared. Taking over from an owner that was only asleep does no
harm: it finds that its number is no longer the highest (`is_current`).

Environment: FTGEN_STALE_S, seconds without a heartbeat after which an owner is dead (60); FTGEN_HOST, this machine's
name (for tests); SLURM_JOB_ID, SLURM_RESTART_COUNT.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

STALE_S = 60.0
BEATS_PER_STALE = 12  # heartbeats that must fail before an owner is given up
SLURM_EVERY_S = 20.0  # between two questions to Slurm's controller
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
ENDED |= {"OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}


def stale_s() -> float:
    """Seconds without a heartbeat after which an owner is dead."""
    return float(os.environ.get("FTGEN_STALE_S") or STALE_S)


class Claim:
    """A claim that this process holds; its heart beats until `release`."""

    def __init__(self, claims: Path, generation: int) -> None:
        """Say who owns the claim that this process has just made, and start its heart."""
        self.claims, self.generation = claims, generation
        self.directory = claims / str(generation)
        self._pid = os.getpid()
        self._stop = threading.Event()
        _write(self.directory / "owner.json", json.dumps(this_process()))
        self._beat(0)
        threading.Thread(target=self._beat_until_released, daemon=True).start()

    def is_current(self) -> bool:
        """Whether nobody has taken over."""
        return highest(self.claims) == self.generation

    def release(self) -> None:
        """Let the next one begin at once; a forked child that ends does not speak for its parent."""
        if os.getpid() == self._pid and not self._stop.is_set():
            self._stop.set()
            _write(self.directory / "released", "")

    def _beat_until_released(self) -> None:
        # Signals are for the main thread: one that comes here would not wake it from a long call.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        count = 0
        while not self._stop.wait(stale_s() / BEATS_PER_STALE):
            count += 1
            self._beat(count)

    def _beat(self, count: int) -> None:
        # In place and of one length: a full disk must not stop the heart of the process that will make room on it.
        _write(self.directory / "heartbeat", f"{count:012d}\n", in_place=count > 0)


class Watch:
    """The current claim as one who waits sees it."""

    def __init__(self, claims: Path) -> None:
        """Begin to watch; nothing is read yet."""
        self.claims = claims
        self._seen: tuple[int, str] = (0, "")
        self._since = 0.0
        self._asked_slurm = float("-inf")

    def claim(self) -> Claim | None:
        """The next claim if the current one is free and no other process was faster, else None: ask again later."""
        current = highest(self.claims)
        if current and not self._is_free(current):
            return None
        try:
            (self.claims / str(current + 1)).mkdir()
        except FileExistsError:
            return None
        return Claim(self.claims, current + 1)

    def holder(self) -> str:
        """Who holds the current claim, in words."""
        owner = self._owner(highest(self.claims))
        if not owner:
            return "a process that has not said who it is"
        job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
        return f"process {owner.get('pid')} on {owner.get('host')}{job}"

    def _is_free(self, current: int) -> bool:
        if (self.claims / str(current) / "released").exists():
            return True
        owner = self._owner(current)
        return _process_is_gone(owner) or self._slurm_job_is_over(owner) or self._heart_stands_still(current)

    def _owner(self, current: int) -> dict[str, Any]:
        try:
            owner = json.loads((self.claims / str(current) / "owner.json").read_text())
        except (OSError, ValueError):
            return {}  # it died before it wrote it, or is about to: the heartbeat decides
        return owner if isinstance(owner, dict) else {}

    def _heart_stands_still(self, current: int) -> bool:
        try:
            beat = (self.claims / str(current) / "heartbeat").read_text()
        except OSError:
            beat = ""
        if self._seen != (current, beat):
            self._seen, self._since = (current, beat), time.monotonic()
        return time.monotonic() - self._since > stale_s()

    def _slurm_job_is_over(self, owner: dict[str, Any]) -> bool:
        job, here = owner.get("slurm_job"), this_process()
        if not job or time.monotonic() - self._asked_slurm < SLURM_EVERY_S:
            return False
        self._asked_slurm = time.monotonic()
        if job == here["slurm_job"]:
            return bool(owner.get("slurm_restart") != here["slurm_restart"])  # our job, before it was requeued
        return _slurm_state(job) in ENDED


def highest(claims: Path) -> int:
    """The number of the current claim, 0 before the first."""
    return max((int(path.name) for path in claims.iterdir() if path.name.isdigit()), default=0)


def this_process() -> dict[str, Any]:
    """What tells this process from every other one, on this machine or another."""
    return {
        "host": os.environ.get("FTGEN_HOST") or socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _pid_namespace(),  # in a container the same number is another process
        "pid": os.getpid(),
        "start": _process(os.getpid())[1],
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _process_is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner ran here and does no more; False where that cannot be told."""
    here = this_process()
    if not owner.get("start") or any(owner.get(key) != here[key] for key in ("host", "boot", "pid_namespace")):
        return False
    state, start = _process(int(owner["pid"]))
    return start != owner["start"] or state in {"Z", "X"}


def _process(pid: int) -> tuple[str, str]:
    """State and start time (clock ticks since boot) of a process; two empty strings when there is none."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # a process's name may hold anything, ")" too
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _slurm_state(job: str) -> str:
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""  # unknown jobs may be another cluster's


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _write(path: Path, text: str, *, in_place: bool = False) -> None:
    try:
        if in_place:
            with path.open("r+") as file:
                file.write(text)
        else:
            path.write_text(text)
    except OSError:
        pass  # a full or absent file system: others will go by the heartbeat
