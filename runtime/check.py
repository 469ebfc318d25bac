"""Check that a job has all it needs, before it does anything: folders, packages, weights, data, GPUs.

In: a plan and the environment. Out: an exit code, and on stderr one error for each thing that is missing.

The check takes about a second, because it imports no framework: it looks into the files of the packages, and counts the
GPUs of this host by its driver.

Environment: STAGE_PATH, NEMO_HOME, HF_TOKEN, HF_TOKEN_PATH, HF_HOME, HF_HUB_OFFLINE, CUDA_VISIBLE_DEVICES,
SLURM_JOB_CPUS_PER_NODE.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime import download, engines
from runtime.data import held_out, hf, lines, split
from runtime.engines import installed, trackers
from runtime.guard import checkpoints, publish
from runtime.hub import errors, find
from runtime.hub.token import has_token
from runtime.job.errors import JobError
from runtime.job.progress import say
from runtime.weights import checkpoint

Plan = dict[str, Any]
IMAGES = ("container", "apptainer", "singularity")  # kinds of Python in which nothing can be installed
TESTED = (2, 7)  # NeMo's earliest release with which fine-tunes that deliver a model were tested
DRIVER = Path("/proc/driver/nvidia/gpus")


def check(plan: Plan) -> int:
    """Exit code 0 if the job can start. Otherwise 1, and on stderr an error and a hint for each thing that is missing."""
    say("packages: " + engines.module(plan, "packages").found())
    problems = [
        *_stage_path(),
        *_packages(plan),
        *_of_nemo(plan),
        *_trackers(plan),
        *_weights(plan),
        *_data(plan),
        *_hub(plan),
        *_checkpoints(plan),
        *_gpus(plan),
    ]
    for problem in problems:
        print(f"ftgen: error: {problem}", file=sys.stderr, flush=True)
    if not problems:
        say(f"nothing is missing for {plan['experiment']}")
    _warn_of_few_cpus(plan)
    return 1 if problems else 0


def packages(plan: Plan) -> int:
    """Check only the packages of this Python, which works on a login node too. Exit code 0 if they are right."""
    say("packages: " + engines.module(plan, "packages").found())
    problems = list(_packages(plan))
    for problem in problems:
        print(f"ftgen: error: {problem}", file=sys.stderr, flush=True)
    return 1 if problems else 0


def _stage_path() -> Iterator[JobError]:
    path = os.environ.get("STAGE_PATH", "")
    hint = "export STAGE_PATH=<a folder that all nodes see and you can write to>"
    if not path:
        yield JobError("STAGE_PATH is not set", hint)
    elif not Path(path).is_dir():
        yield JobError(f"STAGE_PATH: the folder {path} does not exist on this machine", hint)
    elif not os.access(path, os.W_OK | os.X_OK):
        yield JobError(f"STAGE_PATH: you cannot write to {path}", hint)


def _packages(plan: Plan) -> Iterator[JobError]:
    gpu = plan["gpu"]["name"] != "cpu"
    for what in engines.module(plan, "packages").missing([plan["model"][f"{plan['engine']}_recipe"]], gpu=gpu):
        yield JobError(what, _hint(plan, "gpu" if gpu else "runtime"))


def _of_nemo(plan: Plan) -> Iterator[JobError]:
    """What only NeMo from a release on does right."""
    if plan["engine"] != "nemo":
        return
    place = installed.folder("nemo")
    yield from _release(plan, installed.release(place) if place else "")


def _trackers(plan: Plan) -> Iterator[JobError]:
    for name, package in trackers.missing(plan):
        install = f"pip install {package} for {sys.executable}"
        if plan["python"]["kind"] in IMAGES:
            install = f"use an image that has {package}"
        yield JobError(
            f"log.{name}: the package {package} is not installed", f"{install}, or remove log.{name} from the spec"
        )


def _release(plan: Plan, number: str) -> Iterator[JobError]:
    """What an earlier NeMo would do in another way, or not at all: ftgen then might train on other data without a word."""
    asked = [f"[{name}]" for name in ("save", "validation", "export", "log") if plan.get(name)]
    asked += [] if split.is_recipes(plan) else ["data that ftgen packs and orders"]
    parts = tuple(map(int, re.findall(r"\d+", number)[:2]))
    if asked and parts and parts < TESTED:
        hint = f"use NeMo {'.'.join(map(str, TESTED))}, or remove from the spec what needs it"
        yield JobError(f"not tested with NeMo {number}: {', '.join(asked)}", hint)


def _hint(plan: Plan, extra: str) -> str:
    """What to do about packages. Nothing can be installed in an image that is read-only."""
    kind = plan["python"]["kind"]
    if kind in IMAGES:
        return "set python.image in the site profile to another image: `ftgen list --images` says which fit"
    if kind == "venv":
        return "submit the script of `ftgen setup` again, which installs them"
    if plan["engine"] == "megatron_bridge":
        return f"install Megatron-Bridge for {sys.executable} as `make bridge` does, or set FTGEN_PYTHON to a Python with it"
    return f"install ftgen's extra {extra} for {sys.executable}, or set FTGEN_PYTHON to a Python that has them"


def _weights(plan: Plan) -> Iterator[JobError]:
    asked = plan["checkpoint"]
    if checkpoint.converted(plan):
        return
    if asked["source"] == "directory" and not (folder := checkpoint.user_directory(plan)).is_dir():
        yield JobError(f"checkpoint.path: the folder {folder} does not exist", "give the path of a Hugging Face checkpoint")


def _hub(plan: Plan) -> Iterator[JobError]:
    """What a job cannot get from the hub: it is offline, or there is no token. Whether it answers, the download shows."""
    for repository in download.missing(plan):
        if find.offline_variable():
            yield errors.offline(repository, plan["name"])
        elif repository.kind == "model" and plan["checkpoint"]["gated"] and not has_token():
            yield errors.no_token(repository, plan["name"])


def _data(plan: Plan) -> Iterator[JobError]:
    if plan["data"]["path"]:
        try:
            hf.user_path(plan) if plan["data"]["kind"] == "hf" else lines.user_file(plan)
        except JobError as problem:
            yield problem
            return
    try:
        held_out.check(plan)
    except JobError as problem:
        yield problem


def _checkpoints(plan: Plan) -> Iterator[JobError]:
    """Room for the checkpoints that the run keeps and one more; those that it has already need no more room."""
    save = plan.get("save")
    if not save or not os.environ.get("STAGE_PATH"):
        return
    folder = checkpoints.folder_of_run()
    there = sum(path.stat().st_size for path in folder.glob(f"{checkpoints.PREFIX}*/**/*") if path.is_file())
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    try:
        count = save["keep"] + 1
        publish.require_space(
            place, count * save["checkpoint_bytes"] - there, f"room for {count} checkpoints (save.keep + 1)"
        )
    except JobError as problem:
        yield problem


def _gpus(plan: Plan) -> Iterator[JobError]:
    if plan["gpu"]["name"] == "cpu":
        return
    count = gpu_count()
    if count is not None and count < plan["gpus_per_node"]:
        yield JobError(
            f"the plan needs {plan['gpus_per_node']} GPUs on each node, but this process can use only {count}",
            'set gpu_request in the site profile, or set gpus in the spec; gpu = "cpu" needs no GPU',
        )


def _warn_of_few_cpus(plan: Plan) -> None:
    """A job on a part of a node often gets one CPU for each task, unless it asks for more."""
    found = re.match("[0-9]+", os.environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    if found and plan["gpu"]["name"] != "cpu" and int(found[0]) < 2 * plan["gpus_per_node"]:
        say(f"warning: {found[0]} CPUs for {plan['gpus_per_node']} GPUs of a node: set cpus_per_gpu in the site profile")


def gpu_count() -> int | None:
    """The number of GPUs that this process may use. None if there is a driver, but nvidia-smi fails."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in {"", "-1"}])
    if DRIVER.is_dir():
        return len(list(DRIVER.iterdir()))
    if not shutil.which("nvidia-smi"):
        return 0
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.count("UUID: GPU") if answer.returncode == 0 else None
