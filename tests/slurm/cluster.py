"""A real Slurm, and a folder to submit from: what the tests and the fault table share."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = HERE / "slurm-cluster.sh"
SITE = 'gpu_request = "gres"\nmpi = "none"\nexclusive = false\nmem = "1000"\n'
SPEC = 'scheme = "{scheme}"\nprecision = "{precision}"\ngpus = {gpus}\ngpu = "{gpu}"\nmodel = "{model}"\nseq_length = 256\n'
CHECKPOINT = 'checkpoint = {{ source = "{source}" }}\ndata = {{ kind = "synthetic" }}\nwalltime = "{walltime}"\n'


class Cluster:
    """The daemons of a cluster in a folder."""

    def __init__(self, folder: Path, nodes: int = 4, **settings: str) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = (
            os.environ
            | {"SLURMLAB_PARTITIONS": "main other", "SLURMLAB_GPU_TYPE": "h100", "SLURMLAB_PREEMPT": "1"}
            | {"SLURMLAB_GRES": "nvme:2"}
            | settings
        )
        self.environment["SLURM_CONF"] = str(folder / "etc/slurm.conf")

    def up(self) -> None:
        done = subprocess.run(
            [SCRIPT, "up", self.folder, str(self.nodes), "8"],
            capture_output=True,
            text=True,
            env=self.environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def down(self) -> None:
        subprocess.run([SCRIPT, "down", self.folder], capture_output=True, env=self.environment, check=False)

    def call(self, *command: object, **options: object) -> str:
        """A Slurm command's output."""
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, check=False, **{"env": self.environment, **options})
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def start_node(self, name: str) -> None:
        """A node's daemon again, as the cluster's script starts it."""
        start = 'hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts; exec slurmd -N "$1"'
        command = ["unshare", "--uts", "--mount", "--propagation", "slave", "sh", "-ec", start, "sh", name, str(self.folder)]
        subprocess.run(command, env=self.environment, check=True, cwd="/")
        self.call("scontrol", "update", f"nodename={name}", "state=idle")

    def kill_node(self, name: str) -> None:
        """Power off: the daemon, and every process of the node's jobs."""
        daemon = int((self.folder / f"run/{name}.pid").read_text())
        hostname = {pid: _uts(pid) for pid in _processes()}
        for pid in [daemon, *(pid for pid, uts in hostname.items() if uts == hostname.get(daemon) and pid != daemon)]:
            _kill(pid)
        self.call("scontrol", "update", f"nodename={name}", "state=down", "reason=power")


class Job(NamedTuple):
    """What Slurm says of a job."""

    state: str
    exit_code: int
    signal: int
    nodes: int
    restarts: int
    text: str


class Desk:
    """A folder with compiled scripts and a STAGE_PATH, from which jobs are submitted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.stage = cluster, folder, folder / "stage"
        self.stage.mkdir(parents=True)
        self.jobs: list[int] = []
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "program.py"}" "$@"\n')
        self.python.chmod(0o755)

    def compile(
        self, name: str, *, gpus: int = 1, scheme: str = "sft", model: str = "tiny_llama", site: str = "", **more: str
    ) -> Path:
        """A script; `more`: source of the checkpoint, walltime, extra lines of the spec."""
        settings = {"source": "hub", "walltime": "00:10:00", "extra": "", "gpu": "cpu"} | more
        settings["precision"] = "fp32" if settings["gpu"] == "cpu" else "bf16"
        text = (SPEC + CHECKPOINT).format(scheme=scheme, gpus=gpus, model=model, **settings) + settings["extra"]
        (self.folder / f"{name}.toml").write_text(text)
        return self.compile_file(name, site)

    def compile_file(self, name: str, site: str = "") -> Path:
        """The script of a spec that is in the folder."""
        spec, profile = self.folder / f"{name}.toml", self.folder / "site.toml"
        profile.write_text(site if "gpu_request" in site else site + SITE)
        command = [sys.executable, "-m", "ftgen", "compile", spec, "--site", profile, "--out", self.folder / "generated"]
        done = subprocess.run([str(w) for w in command], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return self.folder / "generated" / f"{name}.sh"

    def submit(self, *words: object, **environment: str) -> int:
        """sbatch, as a user with the given environment; the first job's number."""
        return self.submit_in([], *words, **environment)

    def submit_in(self, session: list[str], *words: object, **environment: str) -> int:
        """The same within a session: the words of an salloc or srun."""
        number = int(self.call(*session, "sbatch", "--parsable", *words, **environment))
        self.jobs.append(number)
        return number

    def run_in(self, session: list[str], *words: object, **environment: str) -> int:
        """Run a command in a session and wait for its end; the session's number."""
        said = self.call(*session, *words, **environment)
        number = int(re.findall(r"ftgen: log: .*_(\d+)_\d+\.out", said)[0])
        self.jobs.append(number)
        self.ended(number)
        return number

    def call(self, *words: object, **environment: str) -> str:
        """A command's output, in the folder and the environment of a user."""
        own = {"STAGE_PATH": str(self.stage), "FTGEN_PYTHON": str(self.python), "FTGEN_STALE_S": "6"}
        return self.cluster.call(*words, env=self.cluster.environment | own | environment, cwd=self.folder)

    def job(self, number: int) -> Job:
        text = self.cluster.call("scontrol", "show", "job", number)

        def field(name: str) -> str:
            return re.findall(rf"\b{name}=(\S+)", text)[0]

        code, signal = field("ExitCode").split(":")
        return Job(
            field("JobState"), int(code), int(signal), int(field("NumNodes").split("-")[0]), int(field("Restarts")), text
        )

    def ended(self, number: int, seconds: float = 60) -> Job:
        """Wait for a job's end."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
        until(lambda: self.job(number).state in over, seconds, lambda: f"{self.job(number).text}\n{self.everything()}")
        return self.job(number)

    def queue(self, form: str = "%i %j %T %E") -> list[str]:
        return self.cluster.call("squeue", "--noheader", "--sort=i", f"--format={form}").splitlines()

    def quiet(self, seconds: float = 90) -> None:
        """Wait until no job is left."""
        until(lambda: not self.queue(), seconds, lambda: "\n".join(self.queue()) + self.everything())

    def log(self, number: int, restart: int = 0, kind: str = "log") -> str:
        (found,) = self.stage.glob(f"logs/experiments/*/*_{number}/*/{kind}-*_{number}_{restart}.out")
        return found.read_text()

    def shown(self, number: int, name: str) -> list[str]:
        """The value of a variable in each rank of a job that was submitted with PROGRAM_SHOW, in the order of the ranks."""
        found = re.findall(rf"^rank (\d+) has {name}=(.*)$", self.log(number), re.MULTILINE)
        return [value for _, value in sorted(found, key=lambda each: int(each[0]))]

    def output(self, number: int) -> str:
        """Slurm's own output file, empty before there is one."""
        return "".join(path.read_text() for path in self.folder.glob(f"sbatch_*_{number}.out"))

    def events(self, what: str = "") -> list[str]:
        """Lines of what the stand-in did: time, what, job/restart, host."""
        file = self.stage / "events"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in lines if line.split()[1].startswith(what)]

    def everything(self) -> str:
        """All that was written, for a failure's message."""
        files = [*self.folder.glob("sbatch_*.out"), *self.stage.rglob("*.out")]
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in files)[-8000:]

    def clear(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.cluster.environment, check=False, capture_output=True)
        self.quiet()


def until(condition: Callable[[], object], seconds: float, why: Callable[[], str] = str) -> None:
    """Wait for a condition; the assertion's text is `why()`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {why()}"
        time.sleep(0.2)


def _processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _uts(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/uts").readlink())
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)
