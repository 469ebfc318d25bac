"""Start jobs at once, and let one at a time train on a GPU. In: jobs. Out: each job, when it has ended.

Starting takes most of a short job: imports, the model, its weights. Each job loads its model and waits before its first
step (turn/take_turn.py). No job trains before all of them have loaded or ended. Then those of a GPU train in the order of
the list. A job alone does not wait.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from clocks import Clocks

TURN = Path(__file__).parent / "turn"
POLL_S = 0.2


class Job:
    """A compiled script, how far it is, and what nvidia-smi said while it trained."""

    def __init__(self, script: Path, name: str = "", gpu: str | None = None) -> None:
        self.script, self.gpu = script, gpu
        self.output = script.parent / f"{script.stem}{name}.out"
        self.turn = self.output.with_suffix(".turn")  # a folder
        self.clocks = Clocks(gpu)
        self.loaded_s: float | None = None
        self.went_s: float | None = None
        self.trains = self.must_end = False

    def start(self, environment: dict[str, str], port: int | None) -> None:
        """Start the script. `port`: of a job that has to wait for its turn, and is given this port for its first rank."""
        own = {"CUDA_VISIBLE_DEVICES": self.gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if self.gpu else {}
        if port:
            path = os.pathsep.join(filter(None, (str(TURN), environment.get("PYTHONPATH"))))
            own |= {"PYTHONPATH": path, "TURN": str(self.turn.resolve()), "TURN_PORT": str(port)}
            own |= {"TURN_OWNER": str(os.getpid())}
        shutil.rmtree(self.turn, ignore_errors=True)
        self.turn.mkdir()
        self.began_s = time.monotonic()
        with self.output.open("w") as output:
            self.process = subprocess.Popen(["bash", self.script], env=environment | own, stdout=output, stderr=output)
        if not port:
            self.loaded_s = self.began_s
            self.go()

    def go(self) -> None:
        """Give the job its turn."""
        self.went_s, self.trains = time.monotonic(), True
        self.clocks.begin()
        (self.turn / "go").touch()

    def look(self) -> None:
        """See how far the job is."""
        if self.loaded_s is None and (self.turn / "loaded").exists():
            self.loaded_s = time.monotonic()
        if self.trains and (self.has_ended() or (self.turn / "done").exists()):
            self.trains = False
            self.clocks.end()

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def seconds(self) -> float:
        """What the job has taken, without the wait for its turn."""
        now = time.monotonic()
        return (self.loaded_s or now) - self.began_s + (now - self.went_s if self.went_s else 0.0)

    def end(self) -> None:
        """Tell the job to end, once: its script then ends its processes."""
        if not self.must_end and not self.has_ended():
            self.must_end = True
            self.process.terminate()


def batches(jobs: Sequence[Job], count: int) -> Iterator[list[Job]]:
    """The jobs that start at once: up to `count` for each GPU."""
    of_gpus = [[job for job in jobs if job.gpu == gpu] for gpu in dict.fromkeys(job.gpu for job in jobs)]
    for first in range(0, max(map(len, of_gpus)), count):
        yield [job for those in of_gpus for job in those[first : first + count]]


def run(jobs: Sequence[Job], environment: dict[str, str], limit_s: float) -> Iterator[Job]:
    """Start all jobs; each when it has ended. `limit_s`: seconds that each may take, without the wait for its turn."""
    ports = _free_ports(len(jobs)) if len(jobs) > 1 else [None]
    left: list[Job] = []
    try:
        for job, port in zip(jobs, ports, strict=True):
            job.start(environment, port)
            left.append(job)
        while left:
            time.sleep(POLL_S)
            for job in left:
                job.look()
                if job.seconds() > limit_s:
                    job.end()
            ended, left = [job for job in left if job.has_ended()], [job for job in left if not job.has_ended()]
            _give_turns(left)
            yield from ended
    finally:
        for job in left:
            job.end()


def _give_turns(jobs: Sequence[Job]) -> None:
    """Once all have loaded: on each GPU, to the first that waits, if the one before it has ended and freed its memory."""
    if any(job.loaded_s is None for job in jobs):
        return
    busy = {job.gpu for job in jobs if job.went_s is not None}
    for job in jobs:
        if not job.must_end and job.gpu not in busy:
            busy.add(job.gpu)
            job.go()


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [int(each.getsockname()[1]) for each in sockets]
