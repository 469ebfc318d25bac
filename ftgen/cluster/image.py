"""Writes the command that checks the packages of an image from a login node: the check of a job, inside of the image.

In: a `Plan`, the file of its image, STAGE_PATH, a folder in it with the unpacked script. Out: words of a command. Pure.
"""

from collections.abc import Mapping
from pathlib import Path

from ftgen.plan.plan import Plan
from ftgen.script.paths import path_here
from ftgen.script.render import gpu_request

WAIT_S = 60  # for a free node
MINUTES = 10  # of the job step: most of it is for unpacking the image


def check_command(plan: Plan, image: str, code: Path, environment: Mapping[str, str]) -> list[str]:
    """The command. pyxis runs an image only in a job step, so srun asks for one task; apptainer runs it here."""
    python = [environment.get("FTGEN_PYTHON") or "python3", str(code / f"{plan.name}.py"), "packages"]
    stage = environment["STAGE_PATH"]
    mounts = ",".join([f"{stage}:{stage}", *(path_here(mount, environment) for mount in plan.python.mounts)])
    if plan.python.kind != "container":
        return [plan.python.kind, "exec", "--no-home", "--bind", mounts, image, *python]
    container = [f"--container-image={image}", f"--container-mounts={mounts}", "--no-container-mount-home"]
    return ["srun", *_request(plan, environment), "--export=ALL", *container, *python]


def _request(plan: Plan, environment: Mapping[str, str]) -> list[str]:
    """One task for a few minutes; srun gives up if no node is free."""
    slurm = plan.slurm
    options = {
        "account": slurm.account or environment.get("SBATCH_ACCOUNT"),
        "partition": slurm.partition or environment.get("SBATCH_PARTITION"),
        "qos": slurm.qos or environment.get("SBATCH_QOS"),
        "reservation": slurm.reservation or environment.get("SBATCH_RESERVATION"),
        "constraint": slurm.constraint,
        "nodes": 1,
        "ntasks": 1,
        **gpu_request(slurm, 1),
        "time": MINUTES,
        "immediate": WAIT_S,
        "job-name": "ftgen_doctor",
    }
    return [f"--{option}={value}" for option, value in options.items() if value is not None]
