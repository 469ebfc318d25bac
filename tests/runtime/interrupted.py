"""A training that is killed again and again, and one that is not: what both trained on, step by step.

In: a plan, and the moments of the kills. Out: each step's loss, learning rate and batch, and each validation, as recorded
by recorder.py. Both runs are real ones, with the plan's engine on the CPU.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from stages import INHERITED, Stage, plan

RECORDERS = {"nemo": "recorder.py", "megatron_bridge": "bridge_recorder.py"}
STEPS = 12
LEARNING = {"learning_rate": 2e-3, "warmup_steps": 3}
BASE: dict[str, Any] = {
    "max_steps": STEPS,
    "optimizer": LEARNING,
    "save": {"every_steps": 3, "keep": 2},
    "validation": {"every_steps": 4},
}
DROPOUT = {"scheme": "lora", "lora": {"rank": 4, "dropout": 0.3}, "optimizer": LEARNING | {"learning_rate": 5e-2}}
AGAIN = 85

Lines = dict[tuple[str, int], dict[str, Any]]


class Kill(NamedTuple):
    """When a process sends itself a signal, and which."""

    what: str  # as in recorder.py
    step: int
    signal: str = "KILL"
    rank: int = 0


class Leg(NamedTuple):
    """One attempt of a run."""

    statuses: list[int]  # exit code of each rank
    output: str  # of rank 0


def resumable(*, packed: bool = False, **changes: Any) -> dict[str, Any]:
    """The plan of a tiny run that is saved."""
    document = plan(**BASE | changes)
    document["data"]["packed"] = packed  # no spec may ask for it on a CPU; recorder.py makes it possible
    return document


def train(stage: Stage, document: dict[str, Any], name: str, kill: Kill | None = None, **environment: str) -> Leg:
    """One attempt, with one process for each rank, until all have ended. A rank that dies takes the others with it."""
    ranks = [_start(stage, document, name, rank, kill, environment) for rank in range(document["gpus"])]
    outputs = [""] * len(ranks)
    order = sorted(range(len(ranks)), key=lambda rank: rank != (kill.rank if kill else 0))
    for rank in order:
        outputs[rank] = ranks[rank].communicate(timeout=300)[0]
        if ranks[rank].returncode not in (0, AGAIN):
            for other in ranks:
                other.kill()  # as srun does
    (stage.path / f"{name}.out").open("a").write(outputs[0])
    return Leg([process.returncode for process in ranks], outputs[0])


def _start(
    stage: Stage, document: dict[str, Any], name: str, rank: int, kill: Kill | None, environment: dict[str, str]
) -> subprocess.Popen[str]:
    file = stage.path / f"{name}.json"
    if rank == 0:
        file.write_text(json.dumps(document))
    own = {
        "STAGE_PATH": stage.path,
        "NEMO_HOME": stage.home,
        "HF_HOME": stage.home,
        "FTGEN_RUN_DIR": stage.path / name,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": document["gpus"],
        "NODE_RANK": 0,
        "MASTER_PORT": 29000 + abs(hash(str(stage.path) + name)) % 2000,
        "OMP_NUM_THREADS": 1,
    }
    if kill and kill.rank == rank:
        own |= {"MOMENT": f"{kill.what}:{kill.step}:{kill.signal}:{kill.rank}"}
    inherited = {key: value for key, value in os.environ.items() if key not in INHERITED}
    return subprocess.Popen(
        [stage.python, "-u", Path(__file__).with_name(RECORDERS[document["engine"]]), file, "finetune"],
        env=inherited | {key: str(value) for key, value in own.items()} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def lines(run_directory: Path, rank: int = 0) -> Lines:
    """What a run trained on. Of a step that it made twice, the last time counts."""
    found: Lines = {}
    for text in (run_directory / f"record.{rank}").read_text().splitlines():
        line = json.loads(text)
        found["validation" if "validated" in line else "step", line.get("validated") or line["step"]] = line
    return found


def repeated(run_directory: Path) -> int:
    """Number of steps that a run made again after it had been killed."""
    made = [json.loads(text).get("step") for text in (run_directory / "record.0").read_text().splitlines()]
    return len([step for step in made if step]) - len({step for step in made if step})


def largest_difference(one: Lines, other: Lines) -> float:
    """Of the losses of two runs, at any step or validation."""
    return max(abs(one[key]["loss"] - other[key]["loss"]) for key in one.keys() | other.keys())
