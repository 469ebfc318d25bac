"""Give a process its place: as the only one, or as one rank of a training.

In: a plan, and the variables of whatever started the process. Out: RANK, LOCAL_RANK, NODE_RANK, WORLD_SIZE and
LOCAL_WORLD_SIZE, and no variable that contradicts them.

A framework counts the tasks itself, by the first such variable that it finds. Lightning takes SLURM_NTASKS for the
world size: a conversion in one task of a job with eight then waits for seven others for ever.

Environment: SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID and SLURM_STEP_NUM_TASKS, which srun sets; FTGEN_NODES, the names of
the job's nodes in the order of their ranks; SLURMD_NODENAME; CUDA_VISIBLE_DEVICES.
"""

import os
import re
import socket
from typing import Any

from runtime.job.errors import JobError

Plan = dict[str, Any]
FROM_SLURM = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "NODE_RANK": "SLURM_NODEID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
}
# What counts tasks or numbers them: Slurm's, and those of other launchers that Lightning and NeMo read.
COUNTS_OF_LAUNCHERS = re.compile(
    r"SLURM_(NTASKS|NPROCS|NNODES|TASKS_PER|PROCID|LOCALID|NODEID|GTIDS|STEP)|(OMPI|PMI|PMIX|MV2|LSB|JSM|TORCHELASTIC)_"
)
OF_A_RANK = {"RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
RENDEZVOUS = {"MASTER_ADDR", "MASTER_PORT"}
HINT_BLOCKS = "remove --distribution and --nodelist from srun_flags: ranks must be in blocks, in the order of the nodes"
HINT_GPUS = "every rank needs all GPUs of its node: submit without --gpus-per-task, --gpu-bind and --ntasks-per-gpu"


def be_alone() -> None:
    """Make this process the only one, whatever started it."""
    for name in list(os.environ):
        if COUNTS_OF_LAUNCHERS.match(name) or name in OF_A_RANK | RENDEZVOUS:
            del os.environ[name]


def be_a_rank(plan: Plan) -> None:
    """Copy Slurm's numbers of this task to the variables that PyTorch reads. JobError: the task is in the wrong place.

    They override what a shell or an image has set. Without a step of Slurm that has the plan's tasks, the variables of
    the user hold, and Slurm's are removed: they are those of a session in which the user started the processes.
    """
    env = os.environ
    in_a_step = all(name in env for name in FROM_SLURM.values())
    if in_a_step and (int(env["SLURM_STEP_NUM_TASKS"]) == plan["gpus"] or "RANK" not in env):
        env.update({name: env[slurm] for name, slurm in FROM_SLURM.items()})
        env["LOCAL_WORLD_SIZE"] = str(plan["gpus_per_node"])
        _refuse_a_wrong_place(plan)
        _refuse_too_few_gpus(plan)
    else:
        for name in [name for name in env if COUNTS_OF_LAUNCHERS.match(name) and not name.startswith("TORCHELASTIC_")]:
            del env[name]
    env.setdefault("LOCAL_WORLD_SIZE", str(min(int(env.get("WORLD_SIZE", "1")), plan["gpus_per_node"])))


def set_defaults(plan: Plan) -> None:
    """Set defaults for a single process, and GROUP_RANK, PyTorch's name for NODE_RANK. JobError: a wrong WORLD_SIZE."""
    env = os.environ
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        env.setdefault(name, value)
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(_free_port())
    env["GROUP_RANK"] = env["NODE_RANK"]
    if int(env["WORLD_SIZE"]) != plan["gpus"]:
        raise JobError(
            f"{env['WORLD_SIZE']} processes train, but the plan has {plan['gpus']} GPUs",
            "start one process per GPU, as the job's script does",
        )


def _refuse_a_wrong_place(plan: Plan) -> None:
    rank, local_rank, node_rank = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
    node, local = divmod(rank, plan["gpus_per_node"])
    nodes, here = os.environ.get("FTGEN_NODES", "").split(), os.environ.get("SLURMD_NODENAME", "")
    if (node_rank, local_rank) != (node, local):
        found = f"local rank {local_rank} of node {node_rank}"
        raise JobError(f"rank {rank} must be local rank {local} of node {node}, but is {found}", HINT_BLOCKS)
    if here and node < len(nodes) and nodes[node] != here:
        raise JobError(f"rank {rank} must be on {nodes[node]}, but is on {here}", HINT_BLOCKS)


def _refuse_too_few_gpus(plan: Plan) -> None:
    """A list of GPUs that is shorter than the node's. Without a list, the driver decides: see runtime/check.py."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if plan["gpu"]["name"] == "cpu" or visible is None:
        return
    count = len([device for device in visible.split(",") if device.strip()])
    if count < plan["gpus_per_node"]:
        what = f"this rank can use only {count} of its node's {plan['gpus_per_node']} GPUs (CUDA_VISIBLE_DEVICES={visible})"
        raise JobError(what, HINT_GPUS)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
