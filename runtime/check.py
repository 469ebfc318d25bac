"""Check that a job has all it needs, before it does anything: folders, packages, weights, data, GPUs.

In: a plan and the environment. Out: an exit code, and on stderr one error for each thing that is missing.

The check takes about a second, because it imports no framework: it reads versions from the metadata of the packages,
and counts the GPUs of this host by its driver.

Environment: STAGE_PATH, NEMO_HOME, HF_TOKEN, HF_TOKEN_PATH, HF_HOME, CUDA_VISIBLE_DEVICES.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runtime.data import hf, lines
from runtime.engines.nemo import convert
from runtime.job.errors import JobError
from runtime.job.progress import say

Plan = dict[str, Any]
# Package, prefix of the versions that work, and the reason why no other version works.
PACKAGES = (
    ("nemo_toolkit", "2.7.", "2.7 is the last version with nemo.collections.llm"),
    ("megatron-core", "0.15.", "NeMo 2.7 works with no other version"),
    ("torch", "", ""),
    ("lightning", "", ""),
    ("transformers", "", ""),
    ("huggingface_hub", "", ""),
)
ON_A_GPU = (("transformer-engine", "", ""),)
DRIVER = Path("/proc/driver/nvidia/gpus")


def check(plan: Plan) -> int:
    """Exit code 0 if the job can start. Otherwise 1, and on stderr an error and a hint for each thing that is missing."""
    problems = [*_stage_path(), *_packages(plan), *_weights(plan), *_data(plan), *_gpus(plan)]
    for problem in problems:
        print(f"ftgen: error: {problem}", file=sys.stderr, flush=True)
    if not problems:
        say(f"nothing is missing for {plan['experiment']}")
    return 1 if problems else 0


def packages(plan: Plan) -> int:
    """Check only the packages of this Python, which works on a login node too. Exit code 0 if they are right."""
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
    hint = f"install ftgen's extra {'runtime' if plan['gpu']['name'] == 'cpu' else 'gpu'} for {sys.executable}"
    for name, wanted, why in PACKAGES + (() if plan["gpu"]["name"] == "cpu" else ON_A_GPU):
        try:
            found = version(name)
        except PackageNotFoundError:
            yield JobError(f"the package {name} is not installed", hint)
            continue
        if not found.startswith(wanted):
            yield JobError(f"{name} {found} is installed, {wanted}x is needed: {why}", hint)


def _weights(plan: Plan) -> Iterator[JobError]:
    asked = plan["checkpoint"]
    if convert.converted(plan):
        return
    if asked["source"] == "directory" and not (folder := convert.user_directory(plan)).is_dir():
        yield JobError(f"checkpoint.path: the folder {folder} does not exist", "give the path of a Hugging Face checkpoint")
    if asked["gated"] and not _has_token():
        yield JobError(
            f"{plan['model']['hf_id']} is gated, and there is no Hugging Face token",
            "export HF_TOKEN=<your token>, or run huggingface-cli login",
        )


def _has_token() -> bool:
    """Whether huggingface_hub will find a token. The token itself is not read here."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token"))
    return file.is_file() and file.stat().st_size > 0


def _data(plan: Plan) -> Iterator[JobError]:
    if plan["data"]["path"]:
        try:
            hf.user_path(plan) if plan["data"]["kind"] == "hf" else lines.user_file(plan)
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
