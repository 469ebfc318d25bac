"""A real training of a tiny Llama in a real Slurm, with NeMo on the CPU: what the tests and the table of kills share."""

import os
import subprocess
import sys
from pathlib import Path

from cluster import ROOT, Desk, until

sys.path.insert(0, str(ROOT / "tests" / "runtime"))
from interrupted import Lines, largest_difference, lines, repeated

RECORDER = ROOT / "tests" / "runtime" / "recorder.py"
SITE = 'convert = "task"\ngpus_per_node = 1\n'  # each task on a node of its own
STEPS = 12
SPEC = """scheme = "{scheme}"
precision = "fp32"
gpus = {gpus}
gpu = "cpu"
model = "tiny_llama"
seq_length = 128
global_batch_size = 4
max_steps = {steps}
walltime = "{walltime}"
window = {{ last_steps = 2 }}
data = {{ kind = "synthetic", examples = 200 }}
optimizer = {{ learning_rate = 2e-2, warmup_steps = 3 }}
save = {{ every_steps = 3 }}
validation = {{ every_steps = 4 }}
"""


class Training:
    """A script, a converted checkpoint, and an uninterrupted run to compare with."""

    def __init__(
        self, desk: Desk, *, gpus: int = 1, scheme: str = "lora", site: str = "", walltime: str = "00:10:00"
    ) -> None:
        self.desk = desk
        desk.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -u "{RECORDER}" "$@"\n')
        spec = SPEC.format(scheme=scheme, gpus=gpus, steps=STEPS, walltime=walltime)
        (desk.folder / "training.toml").write_text(spec + ("lora = { dropout = 0.2 }\n" if scheme == "lora" else ""))
        self.script = desk.compile_file("training", SITE + site)

    def whole(self) -> Path:
        """The folder of an uninterrupted run. The jobs after it use its converted checkpoint and its data."""
        code = self.desk.folder / "code"
        subprocess.run(["bash", self.script, "--unpack", code], check=True)
        convert = [sys.executable, code / "training.py", "convert"]
        subprocess.run(convert, env=os.environ | {"STAGE_PATH": str(self.desk.stage)}, check=True, capture_output=True)
        run = self.submit()
        assert self.desk.ended(run, 240).state == "COMPLETED", self.desk.everything()
        return self.run_directory(run)

    def submit(self, *words: object, **environment: str) -> int:
        return self.desk.submit(*words, self.script, OMP_NUM_THREADS="1", **environment)

    def resume(self, run: int, **environment: str) -> int:
        return self.desk.submit(self.script, "--resume", run, OMP_NUM_THREADS="1", **environment)

    def run_directory(self, run: int) -> Path:
        (found,) = self.desk.stage.glob(f"logs/experiments/*/*_{run}/*")
        return found

    def until_step(self, run: int, step: int) -> None:
        """Wait until a run has made a step."""
        until(lambda: ("step", step) in self.made(run), 180, self.desk.everything)

    def made(self, run: int) -> Lines:
        try:
            return lines(self.run_directory(run))
        except (FileNotFoundError, ValueError):
            return {}


__all__ = ["Lines", "Training", "largest_difference", "lines", "repeated"]
