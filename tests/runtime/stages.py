"""Plans, and processes that run them, as a job's script would."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftgen.plan.resolve import resolve
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec

JOB = Path(__file__).with_name("job.py")
TINY: dict[str, Any] = {
    "model": "tiny_llama",
    "scheme": "sft",
    "precision": "fp32",
    "gpu": "cpu",
    "gpus": 1,
    "seq_length": 128,
    "global_batch_size": 4,
    "max_steps": 25,
    "data": {"kind": "synthetic", "examples": 200},
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5},
    "window": {"last_steps": 2},
}
INHERITED = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"}


def plan(**changes: Any) -> dict[str, Any]:
    """The plan of a tiny run on the CPU, with changes to its spec."""
    document = resolve(Spec.model_validate(TINY | changes), Site(), name="tiny")
    return dict(json.loads(json.dumps(asdict(document))))


class Stage:
    """A STAGE_PATH, and the commands of a job in it."""

    def __init__(self, path: Path, python: str | Path = sys.executable, job: Path = JOB) -> None:
        self.path = path
        self.job = job  # the program of a task
        self.python = python
        self.home = path / "HF_ckpt"
        self.place = self.home / "models" / "random" / "tiny_llama-1234"

    def start(self, plan: dict[str, Any], command: str, **environment: str) -> subprocess.Popen[str]:
        file = self.path / f"plan-{abs(hash(json.dumps(plan)))}.json"
        file.write_text(json.dumps(plan))
        inherited = {name: value for name, value in os.environ.items() if name not in INHERITED}
        own = {"STAGE_PATH": self.path, "NEMO_HOME": self.home, "HF_HOME": self.home, "FTGEN_RUN_DIR": self.path / "run"}
        return subprocess.Popen(
            [self.python, "-u", str(self.job), str(file), command],
            env=inherited | {name: str(value) for name, value in own.items()} | environment,
            cwd=self.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, plan: dict[str, Any], command: str, **environment: str) -> tuple[int, str]:
        process = self.start(plan, command, **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output
