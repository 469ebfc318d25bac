"""Fine-tune a tiny model from its data to an answer, on this machine's CPU: python examples/finetune.py. It takes minutes.

In: specs/quickstart_finetune.toml, the packages of a job. Out: the log of the run, its table, and the answer of the
exported model, on stdout. Files go to $STAGE_PATH, which is the current folder by default. Exit code 0 if all went well.

The training is killed in the middle, as the kernel kills a program that has no memory left. Nothing can be done about that
at the time, so the run goes on after its last checkpoint.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "specs" / "quickstart_finetune.toml"
DATA = Path("specs", "data")  # below STAGE_PATH, as in the spec
QUESTION = "What do bees make from nectar?"
KILLED_AT = "iteration 112/"  # between the checkpoints of the steps 100 and 125
GO_ON = re.compile(r"the run can go on after step (\d+): bash \S+ --resume (\S+)")
READY = re.compile(r"ftgen: the export is ready: (.+)")
STEPS = (
    "compile the spec to a script",
    f"run the script, and kill the training at {KILLED_AT.rstrip('/')}",
    "go on after the last checkpoint, validate, and export",
    "print the table of the run",
    "load the exported model with transformers, and ask it",
)


def main() -> int:
    """All five steps."""
    stage = Path(os.environ.get("STAGE_PATH") or Path.cwd())
    if stage.resolve() != ROOT:
        (stage / DATA).mkdir(parents=True, exist_ok=True)
        for file in (ROOT / DATA).iterdir():
            (stage / DATA / file.name).write_text(file.read_text())
    os.environ["STAGE_PATH"] = str(stage)
    os.environ["FTGEN_PYTHON"] = sys.executable
    ftgen = [sys.executable, "-m", "ftgen"]
    _say(0)
    subprocess.run([*ftgen, "compile", SPEC, "--out", stage / "generated"], check=True)
    script = stage / "generated" / f"{SPEC.stem}.sh"
    _say(1)
    status, log = run(script, kill_at=KILLED_AT)
    found = GO_ON.search(log)
    if not status or not found:
        return _fail("the training was not killed")
    _say(2)
    status, log = run(script, "--resume", found[2])
    ready = READY.search(log)
    if status or not ready or f"resumed after step {found[1]}" not in log:
        return _fail("the run did not go on to its end")
    _say(3)
    run_folder = Path(ready[1]).parents[2]
    columns = "run_id,status,steps,step_time_s,validation_loss,attempts,goodput,saves,save_share,tokens_trained"
    subprocess.run([*ftgen, "tabulate", run_folder, "--flat", "--columns", columns], check=True)
    _say(4)
    print(f"> {QUESTION}", flush=True)
    subprocess.run([sys.executable, ROOT / "examples" / "ask.py", ready[1], QUESTION], check=True)
    return 0


def run(script: Path, *words: str, kill_at: str = "") -> tuple[int, str]:
    """Run the job's script and show its output; exit code and output. The training is killed at a line with `kill_at`."""
    lines = []
    with subprocess.Popen(
        ["bash", script, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as job:
        for line in job.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
            if kill_at and kill_at in line:
                os.kill(_training(job.pid), signal.SIGKILL)
                kill_at = ""
    return job.returncode, "".join(lines)


def _training(script: int) -> int:
    """The process of the training: the child of the script that runs the command finetune."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        if parent == script and b"finetune" in words:
            return int(folder.name)
    raise SystemExit("the training is not there")


def _say(step: int) -> None:
    print(f"\n{step + 1}/{len(STEPS)} {STEPS[step]}\n", flush=True)


def _fail(what: str) -> int:
    print(f"error: {what}: see the log above", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
