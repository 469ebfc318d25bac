"""Refuses sbatch and srun options that the generated script sets, and names the key to use instead.

In: a `Site`. Out: `Problem`s, whose keys begin with `site`. Pure.
"""

import re
from collections.abc import Iterator

from ftgen.errors import KeyPath, Problem
from ftgen.spec.site import Site

# Options that sbatch_flags must not have, and what sets them.
SITE_OPTIONS = ["partition", "account", "qos", "reservation", "constraint", "segment", "exclusive", "requeue"]
SITE_OPTIONS += ["mem", "mem_per_cpu", "mem_per_gpu", "cpus_per_gpu"]
SET_ELSEWHERE = {
    **{f"--{key.replace('_', '-')}": f"site.{key}" for key in SITE_OPTIONS},
    "--gres": "site.gpu_request, or site.gres for other resources,",
    "--gpus-per-node": "site.gpu_request",
    **dict.fromkeys(("--nodes", "--ntasks", "--ntasks-per-node", "--gpus"), "gpus in the spec"),
    **dict.fromkeys(("--dependency", "--error", "--open-mode", "--array"), "the generated script"),
    "--job-name": "site.job_name_prefix",
    "--output": "site.output_folder",
    "--no-requeue": "site.requeue",
    "--signal": "site.end_before_limit_s",
    "--time": "walltime in the spec",
}
# Options that srun_flags must not have, and what sets them.
SET_BY_SRUN = {
    **dict.fromkeys(("--nodes", "--ntasks", "--ntasks-per-node", "--kill-on-bad-exit", "--export"), "the generated script"),
    **dict.fromkeys(("--output", "--error", "--label"), "the generated script"),
    "--mpi": "site.mpi",
    "--cpus-per-task": "site.cpus_per_gpu",
    "--container-image": "site.python.image",
    "--container-mounts": "site.python.mounts",
    "--container-name": "site.python.container_name",
    "--container-env": "site.python.container_env",
    "--container-writable": "site.python.writable",
    **dict.fromkeys(("--container-mount-home", "--no-container-mount-home"), "site.python.mount_home"),
}
# Options that give each task only some GPUs of its node. NeMo and Lightning choose the GPU by the local rank: with one GPU
# for each task, rank 1 would ask for a second GPU that it does not see.
GPUS_OF_A_TASK = {"--gpus-per-task", "--gpu-bind", "--ntasks-per-gpu", "--tres-per-task", "--tres-bind"}


def flag_problems(site: Site) -> Iterator[Problem]:
    """Every option that must not be in sbatch_flags, srun_flags or convert_flags."""
    for key in ("sbatch_flags", "srun_flags", "convert_flags"):
        yield from _flags(key, getattr(site, key))
    for number, flag in enumerate(site.sbatch_flags):
        if site.cpus_per_gpu and flag.startswith("--cpus-per-task"):
            yield Problem(("site", "sbatch_flags", number), "must not have --cpus-per-task: site.cpus_per_gpu sets it")


def _flags(key: str, flags: list[str]) -> Iterator[Problem]:
    for number, flag in enumerate(flags):
        where: KeyPath = ("site", key, number)
        option = flag.partition("=")[0]
        if not re.fullmatch("--[A-Za-z][A-Za-z0-9-]*", option):
            yield Problem(where, f"must be a long option, --name or --name=value, found {flag!r}")
        elif key == "sbatch_flags" and option in SET_ELSEWHERE:
            yield Problem(where, f"must not have {option}: {SET_ELSEWHERE[option]} sets it")
        elif key == "srun_flags" and option in SET_BY_SRUN:
            yield Problem(where, f"must not have {option}: {SET_BY_SRUN[option]} sets it")
        elif key != "convert_flags":
            yield from _placement(where, flag)


def _placement(where: KeyPath, flag: str) -> Iterator[Problem]:
    """Options that would change which GPUs a rank has, and on which node it runs."""
    option, _, value = flag.partition("=")
    if option in GPUS_OF_A_TASK and value != "none":
        rule = f"must not have {option}: every rank needs all GPUs of its node, because it chooses its GPU by its local rank"
        yield Problem(where, rule, "remove it: gpu_request asks for the GPUs of a node")
    if option == "--distribution" and not value.startswith("block"):
        rule = f"must have ranks in blocks, so that tensor-parallel ranks share a node, found {flag}"
        yield Problem(where, rule, "remove it, or use --distribution=block:...")
