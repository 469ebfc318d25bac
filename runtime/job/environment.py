"""Write the environment of a training into its log: versions, machine, Slurm job. `ftgen report` shows it.

In: a plan and the process environment. Out: one line in the log, `ftgen environment: {...}`.
"""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
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
JOB = {"job": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "partition": "SLURM_JOB_PARTITION"}


def tell(plan: dict[str, Any], off: dict[str, str] | None = None) -> None:
    """Print the line; only rank 0 does. `off`: optimizations of the plan that these packages cannot do, and why."""
    if os.environ.get("RANK", "0") == "0":
        facts = found(plan) | ({"optimizations_off": off} if off else {})
        print(f"ftgen environment: {json.dumps(facts)}", flush=True)


def found(plan: dict[str, Any]) -> dict[str, Any]:
    """The environment as names and values; what this machine does not have is left out."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: number for name in PACKAGES if (number := installed(name))},
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        **{name: os.environ[variable] for name, variable in JOB.items() if os.environ.get(variable)},
    }
    return facts | (_gpu() if plan["gpu"]["name"] != "cpu" else {})


def _gpu() -> dict[str, Any]:
    import torch

    here = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": here.name,
        "gpu_memory_gib": round(here.total_memory / 2**30, 2),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": DRIVER.read_text().strip() if DRIVER.is_file() else None,
    }


def installed(package: str) -> str | None:
    """The version of a package: of the one that is imported, if it is. None if it is not installed."""
    if found := getattr(sys.modules.get(IMPORTED.get(package, "")), "__version__", None):
        return str(found).partition("+")[0]  # behind it is the commit of whatever repository the job was started in
    try:
        return version(package)
    except PackageNotFoundError:
        return None
