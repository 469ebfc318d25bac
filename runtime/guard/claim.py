"""Decide which of many processes builds a folder, by numbered claims on a shared file system.

In: a directory of claims. Out: a `Claim`, the right to build, for one process at a time.

Claim n is the directory `<claims>/<n>`. The claim with the highest number is the current one. A process takes over
from n by `mkdir n+1`, which succeeds for exactly one process of all machines. (File locks are no alternative: on many
cluster file systems they succeed for every process.) A claim is never deleted, so a number never has two owners. A
claim contains

    owner.json   its owner: user, host, boot, pid namespace, pid and its start time, Slurm job and restart
    heartbeat    a counter that the owner increases every few seconds
    released     exists once the owner has finished or failed

An owner counts as dead in three cases: it ran on this machine and its process has ended; Slurm says that its job has
ended; its heartbeat has not changed for FTGEN_STALE_S. The waiting process measures that time with its own clock and
never compares a time that another machine wrote, because clocks differ between machines. Taking over from an owner
that was only suspended does no harm: when it wakes, its number is no longer the highest (`is_current`), and it
publishes nothing.

Environment: FTGEN_STALE_S, seconds without a heartbeat after which an owner counts as dead (60); FTGEN_HOST, the name
of this machine (for tests); SLURM_JOB_ID, SLURM_RESTART_COUNT.
"""

import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from runtime.job import signals
from runtime.job.sharing import user_name

STALE_S = 60.0
BEATS_PER_STALE = 12  # heartbeats that an owner must miss to count as dead
SLURM_EVERY_S = 20.0  # between two calls of squeue
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
ENDED |= {"OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}


def stale_s() -> float:
    """Seconds without a heartbeat after which an owner counts as dead."""
    return float(os.environ.get("FTGEN_STALE_S") or STALE_S)


class Claim:
    """A claim that this process owns. A thread writes the heartbeat until `release`."""

    def __init__(self, claims: Path, generation: int) -> None:
        """Write the owner into the claim directory, which this process has just made, and start the heartbeat."""
        self.claims, self.generation = claims, generation
        self.directory = claims / str(generation)
        self._pid = os.getpid()
        self._stop = threading.Event()
        _write(self.directory / "owner.json", json.dumps(this_process()))
        self._beat(0)
        signals.start_thread(self._beat_until_released)

    def is_current(self) -> bool:
        """Whether no other process has taken over."""
        return highest(self.claims) == self.generation

    def release(self) -> None:
        """Let the next process take over at once. In a forked child this does nothing: the parent still owns the claim."""
        if os.getpid() == self._pid and not self._stop.is_set():
            self._stop.set()
            _write(self.directory / "released", "")

    def _beat_until_released(self) -> None:
        count = 0
        while not self._stop.wait(stale_s() / BEATS_PER_STALE):
            count += 1
            self._beat(count)

    def _beat(self, count: int) -> None:
        # Overwritten in place with the same length, so that the heartbeat goes on when the disk is full.
        _write(self.directory / "heartbeat", f"{count:012d}\n", in_place=count > 0)


class Watch:
    """The current claim, as a waiting process sees it."""

    def __init__(self, claims: Path) -> None:
        """Nothing is read yet."""
        self.claims = claims
        self._seen: tuple[int, str] = (0, "")
        self._since = 0.0
        self._asked_slurm = float("-inf")

    def claim(self) -> Claim | None:
        """The next claim, if the current one is free and no other process was faster. Otherwise None: try again later."""
        current = highest(self.claims)
        if current and not self._is_free(current):
            return None
        try:
            (self.claims / str(current + 1)).mkdir()
        except FileExistsError:
            return None
        return Claim(self.claims, current + 1)

    def holder(self) -> str:
        """The owner of the current claim, as text for the log."""
        owner = self._owner(highest(self.claims))
        if not owner:
            return "an unknown process"
        job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
        return f"process {owner.get('pid')} on {owner.get('host')}{job}, user {owner.get('user', 'unknown')},"

    def _is_free(self, current: int) -> bool:
        if (self.claims / str(current) / "released").exists():
            return True
        owner = self._owner(current)
        return _process_is_gone(owner) or self._slurm_job_is_over(owner) or self._heartbeat_has_stopped(current)

    def _owner(self, current: int) -> dict[str, Any]:
        try:
            owner = json.loads((self.claims / str(current) / "owner.json").read_text())
        except (OSError, ValueError):
            return {}  # the owner has not written it yet, or died before: the heartbeat decides
        return owner if isinstance(owner, dict) else {}

    def _heartbeat_has_stopped(self, current: int) -> bool:
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
            # the owner may be an earlier run of this job, before Slurm requeued it
            return bool(owner.get("slurm_restart") != here["slurm_restart"])
        return _slurm_state(job) in ENDED


def highest(claims: Path) -> int:
    """The number of the current claim, 0 before the first."""
    return max((int(path.name) for path in claims.iterdir() if path.name.isdigit()), default=0)


def this_process() -> dict[str, Any]:
    """What identifies this process among all processes of all machines."""
    return {
        "user": user_name(),
        "host": os.environ.get("FTGEN_HOST") or socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _pid_namespace(),  # a pid in a container is not the same process outside
        "pid": os.getpid(),
        "start": _process(os.getpid())[1],
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _process_is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine and has ended. False if it ran elsewhere."""
    here = this_process()
    if not owner.get("start") or any(owner.get(key) != here[key] for key in ("host", "boot", "pid_namespace")):
        return False
    state, start = _process(int(owner["pid"]))
    return start != owner["start"] or state in {"Z", "X"}


def _process(pid: int) -> tuple[str, str]:
    """State and start time (clock ticks since boot) of a process; two empty strings if it does not exist."""
    # the name of a process can contain any character, also ")"
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _slurm_state(job: str) -> str:
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""  # an unknown job may belong to another cluster


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
        pass  # the file system is full or gone: other processes rely on the heartbeat
