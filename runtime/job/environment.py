"""Write the environment of a training into its log: versions, machine, Slurm job. `ftgen report` shows it.

In: a plan and the process environment. Out: one line in the log, `ftgen environment: {...}`, and beside the log the file
environment.json, which also has what is too long for a line: every package, firmware, the topology of the GPUs.

Environment: RANK, FTGEN_RUN_DIR, FTGEN_SCRIPT_SHA256, and Slurm's variables in JOB.
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "nemo_toolkit",
    "megatron-bridge",
    "megatron-core",
    "transformer-engine",
    "lightning",
    "transformers",
    "numpy",
)
# Where a package that is imported has its version: sources that a spec adds have no other.
IMPORTED = {"nemo_toolkit": "nemo", "megatron-core": "megatron.core", "megatron-bridge": "megatron.bridge"}
DRIVER = Path("/sys/module/nvidia/version")
INFINIBAND = Path("/sys/class/infiniband")
LONGEST_S = 20  # that nvidia-smi may take
JOB = {"job": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "partition": "SLURM_JOB_PARTITION"}


def tell(plan: dict[str, Any], off: dict[str, str] | None = None) -> None:
    """Print the line; only rank 0 does. `off`: optimizations of the plan that these packages cannot do, and why."""
    if os.environ.get("RANK", "0") == "0":
        facts = found(plan) | ({"optimizations_off": off} if off else {})
        print(f"ftgen environment: {json.dumps(facts)}", flush=True)
        if folder := os.environ.get("FTGEN_RUN_DIR"):
            _write(Path(folder, "environment.json"), facts | more(plan))


def found(plan: dict[str, Any]) -> dict[str, Any]:
    """The environment as names and values; what this machine does not have is left out."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": packages(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        **{name: os.environ[variable] for name, variable in JOB.items() if os.environ.get(variable)},
        **({"script_sha256": script} if (script := os.environ.get("FTGEN_SCRIPT_SHA256")) else {}),
    }
    return facts | (_gpu() if plan["gpu"]["name"] != "cpu" else {})


def packages() -> dict[str, str]:
    """Versions of the packages that decide what is computed."""
    return {name: number for name in PACKAGES if (number := installed(name))}


def more(plan: dict[str, Any]) -> dict[str, Any]:
    """What is too long for a line of the log; what this machine does not have is left out."""
    every = {each.name: each.version for each in distributions() if each.name}
    firmware = {path.parent.name: path.read_text().strip() for path in sorted(INFINIBAND.glob("*/fw_ver"))}
    facts: dict[str, Any] = {"all_packages": dict(sorted(every.items())), "infiniband": firmware}
    if plan["gpu"]["name"] != "cpu":
        facts |= {"topology": _nvidia_smi("topo", "-m")}
        facts |= {"vbios": _nvidia_smi("--query-gpu=vbios_version", "--format=csv,noheader", "--id=0")}
    return {name: value for name, value in facts.items() if value}


def _nvidia_smi(*words: str) -> str | None:
    """What nvidia-smi prints; None if it is not there or fails, as in an image without it."""
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _write(file: Path, facts: dict[str, Any]) -> None:
    """Write the file. The training goes on without it: a disk may be full."""
    try:
        file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"ftgen: warning: {file} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def _gpu() -> dict[str, Any]:
    import torch

    here = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": here.name,
        "gpu_memory_gib": round(here.total_memory / 2**30, 2),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": DRIVER.read_text().strip() if DRIVER.is_file() else None,
    }


def _cudnn() -> int | None:
    """The version of cuDNN that is loaded. If it is not the one for this PyTorch, PyTorch refuses to say it."""
    import torch

    try:
        found: int | None = torch.backends.cudnn.version()
    except RuntimeError as error:
        what = str(error).partition(". ")[0]
        print(f"ftgen: warning: {what}", file=sys.stderr, flush=True)
        return None
    return found


def installed(package: str) -> str | None:
    """The version of a package: of the one that is imported, if it is. None if it is not installed."""
    if found := getattr(sys.modules.get(IMPORTED.get(package, "")), "__version__", None):
        return str(found).partition("+")[0]  # behind it is the commit of whatever repository the job was started in
    try:
        return version(package)
    except PackageNotFoundError:
        return None
