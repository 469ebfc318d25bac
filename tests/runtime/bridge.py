"""Plans and trainings for Megatron-Bridge on the CPU, in .venv-bridge, which `make bridge` makes."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from stages import Stage, plan

PYTHON = Path(__file__).parents[2] / ".venv-bridge" / "bin" / "python"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Run(NamedTuple):
    """A training: its output, and its losses as printed."""

    output: str
    losses: list[float]


def bridge_stage(stage: Stage) -> Stage:
    """The stage, with the Python that has Megatron-Bridge."""
    assert PYTHON.exists(), f"{PYTHON} does not exist: run make bridge"
    return Stage(stage.path, PYTHON)


def bridge_plan(*, packed: bool = False, on: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """A plan for Megatron-Bridge, with what no spec may ask of a CPU: packs, and optimizations."""
    document = plan(**{"engine": "megatron_bridge"} | changes)
    document["data"]["packed"] = packed
    document["optimizations"] |= dict.fromkeys(on, True)
    return document


def train(stage: Stage, document: dict[str, Any], **environment: str) -> Run:
    status, output = stage.run(document, "finetune", **ONE_THREAD, **environment)
    assert status == 0, output[-3000:]
    return Run(output, losses(output))


def losses(output: str) -> list[float]:
    """Of NeMo's or of Megatron-Bridge's step lines."""
    found = re.findall(r"^Training epoch .* reduced_train_loss: (\S+)|iteration .*\| lm loss: (\S+)", output, re.MULTILINE)
    return [float(nemo or bridge) for nemo, bridge in found]
