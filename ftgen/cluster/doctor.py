"""Checks on a login node whether jobs will run, before they wait in the queue.

In: a `Site` and `Plan`s. Out: `Finding`s. The checks write only temporary folders, and submit no batch job. pyxis runs an
image only on a node: to look into it, srun asks for one task, and gives up if no node is free.

Environment: STAGE_PATH, FTGEN_PYTHON; hub.py has those of the Hugging Face hub.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ftgen.cluster import hub
from ftgen.cluster.finding import Finding, run
from ftgen.cluster.image import MINUTES, WAIT_S, check_command
from ftgen.plan.images import is_file
from ftgen.plan.plan import Plan
from ftgen.plan.resolve import resolve
from ftgen.script.paths import path_here
from ftgen.script.render import render
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec

GIB = 1 << 30
SETUP = "submit the script of `ftgen setup --site FILE SPEC`"
# Types of file systems in /proc/mounts that other nodes do not see.
LOCAL = {"btrfs", "ext2", "ext3", "ext4", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


def examine(site: Site, plans: list[Plan]) -> Iterator[Finding]:
    """Run every check. Without plans, the checks are for a LoRA of the recipe on one node."""
    if not plans:
        spec = Spec.model_validate({"scheme": "lora", "precision": "bf16", "gpus": site.gpus_per_node or 8})
        plans = [resolve(spec, site, name="one_node", spec_file="one_node.toml")]
    stage = Path(os.environ.get("STAGE_PATH") or path_here(site.stage_path or "", os.environ) or Path.cwd()).absolute()
    reachable = _slurm()
    yield reachable
    yield from _share_of_a_node(site)
    if not site.output_folder:
        yield _submit_folder(Path.cwd())
    yield from _stage_path(stage, site, plans)
    with tempfile.TemporaryDirectory(prefix="ftgen-doctor-") as folder:
        for plan in plans:
            for name, text in render(plan).items():
                Path(folder, name).write_text(text, encoding="utf-8")
            if reachable.verdict == "ok":
                yield _request(plan, Path(folder, f"{plan.name}.sh"))
        yield _python(plans[0], Path(folder), stage)
        missing = {plan.name: hub.missing(plan, Path(folder), stage) for plan in plans}
    yield from _sources(plans, stage)
    yield from hub.findings(plans, missing)


def _share_of_a_node(site: Site) -> Iterator[Finding]:
    """What a job that shares nodes may not expect. And the folder of Slurm's own output: without it, a job says nothing."""
    if not site.exclusive and not site.cpus_per_gpu:
        what = "exclusive = false without cpus_per_gpu: each GPU's task gets as many CPUs as Slurm gives, often one"
        yield Finding("warn", what, "set cpus_per_gpu in the site profile to the CPUs of a node / its GPUs")
    folder = site.output_folder
    if folder and "%" not in folder and not os.access(folder, os.W_OK):
        hint = "create it: Slurm does not, and a job without its output file ends with no word"
        yield Finding("FAIL", f"output_folder: {folder} is not a folder that you can write to", hint)


def _slurm() -> Finding:
    status, said = run("scontrol", "ping")
    if status == 0 and "is UP" in said:
        return Finding("ok", f"Slurm answers: {run('sinfo', '--version')[1]}")
    hint = "run this on a login node of the cluster" if status == 127 else "ask the operators of the cluster"
    return Finding("FAIL", f"Slurm does not answer: {_last_line(said)}", hint)


def _request(plan: Plan, script: Path) -> Finding:
    """Whether Slurm would accept the job. Nothing is submitted."""
    what = f"{plan.name}: {plan.nodes} x {plan.gpus_per_node} GPUs"
    status, said = run("sbatch", "--test-only", script)
    if status == 0:
        return Finding("ok", f"{what}: Slurm accepts the job ({_last_line(said).removeprefix('sbatch: ')})")
    return Finding("FAIL", f"{what}: Slurm refuses the job: {_reason(said)}", _request_hint(said))


def _reason(said: str) -> str:
    lines = [line.split("error: ", 1)[1] for line in said.splitlines() if "error: " in line]
    return "; ".join(dict.fromkeys(lines)) or _last_line(said)


def _request_hint(said: str) -> str:
    hints = {
        "account": "set account in the site profile, or export SBATCH_ACCOUNT: see sacctmgr show associations user=$USER",
        "partition": "set partition in the site profile, or export SBATCH_PARTITION: sinfo -s shows the partitions",
        "qos": "set qos in the site profile: sacctmgr show qos shows them",
        "reservation": "set reservation in the site profile: scontrol show reservation shows them",
        "gres": 'set gpu_request in the site profile: sinfo -o "%P %G" shows the GPUs of each partition',
        "time limit": "set walltime in the spec: sinfo -s shows the time limit of each partition",
        "node": 'set gpus in the spec, or the GPUs and the partition in the site profile: see sinfo -o "%P %D %G"',
    }
    found = [hint for word, hint in hints.items() if word in said.lower()]
    return found[0] if found else "compare the #SBATCH lines of the compiled script with the manual of the cluster"


def _submit_folder(folder: Path) -> Finding:
    """Whether Slurm can write the jobs' output files, sbatch_*.out, into the folder of the submission."""
    hint = "call sbatch in a folder that all nodes share and that you can write to, or set output_folder in the site profile"
    if not os.access(folder, os.W_OK | os.X_OK):
        what = f"you cannot write to {folder}: jobs submitted here end with JobLaunchFailure, and without any output"
        return Finding("FAIL", what, hint)
    kind = _file_system(folder)
    if kind in LOCAL:
        return Finding("warn", f"jobs submitted in {folder} write sbatch_*.out there: it is on {kind}", hint)
    return Finding("ok", f"jobs submitted in {folder} write sbatch_*.out there")


def _stage_path(stage: Path, site: Site, plans: list[Plan]) -> Iterator[Finding]:
    hint = "create it with mkdir -p, or export STAGE_PATH=<a folder that all nodes share>"
    if not os.environ.get("STAGE_PATH") and not site.stage_path:
        yield Finding("warn", f"STAGE_PATH is not set: jobs will use {stage}", "export STAGE_PATH=<a folder>")
    if not stage.is_dir() or not os.access(stage, os.W_OK | os.X_OK):
        yield Finding("FAIL", f"STAGE_PATH: {stage} is not a folder that you can write to", hint)
        return
    kind = _file_system(stage)
    if kind in LOCAL:
        yield Finding("warn", f"STAGE_PATH: {stage} is on {kind}, which other nodes usually do not see", hint)
    else:
        yield Finding("ok", f"STAGE_PATH: you can write to {stage}, which is on {kind}")
    if (problem := _group_problem(stage)) is not None:
        yield problem
    need, free = _need_bytes(stage, plans), shutil.disk_usage(stage).free
    room = f"STAGE_PATH: {free / GIB:.0f} GiB are free, checkpoints need {need / GIB:.0f} GiB"
    yield (
        Finding("ok", room)
        if free >= need
        else Finding("FAIL", room, "free some space, or export STAGE_PATH=<a larger one>")
    )
    for path in site.shared_paths:
        if not Path(path_here(path, {**os.environ, "STAGE_PATH": str(stage)})).exists():
            yield Finding("FAIL", f"shared_paths: {path} does not exist here", "correct the site profile")


def _group_problem(stage: Path) -> Finding | None:
    """A folder that its group may write needs setgid, or what jobs make there belongs to another group."""
    mode, gid = stage.stat().st_mode, stage.stat().st_gid
    if not mode & stat.S_IWGRP or mode & stat.S_ISGID or gid == os.getgid():
        return None
    what = f"STAGE_PATH: what jobs make in {stage} does not get the folder's group, so other members cannot write to it"
    return Finding("warn", what, f"chmod g+s {stage}")


def _file_system(path: Path) -> str:
    """Type of the file system, by its name in /proc/mounts."""
    best, kind = "", "an unknown file system"
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, name, *_ = line.split()
        mount = mount.replace("\\040", " ")
        if len(mount) >= len(best) and (path == Path(mount) or Path(mount) in path.parents):
            best, kind = mount, name
    return kind


def _need_bytes(stage: Path, plans: list[Plan]) -> int:
    """Bytes that download and conversion of missing checkpoints write: two per parameter each."""
    home = stage / "HF_ckpt"
    missing = {p.checkpoint.place: p for p in plans if not (home / "models" / p.checkpoint.place).exists()}
    there = {p.checkpoint.place for p in plans if any((home / "downloads/models").glob(f"{p.model.hf_id}@*"))}
    once = {p.checkpoint.place for p in plans if p.checkpoint.source == "directory"} | there
    return sum(2 * p.model.parameters * (1 if place in once else 2) for place, p in missing.items())


def _python(plan: Plan, folder: Path, stage: Path) -> Finding:
    python = plan.python
    here = {**os.environ, "STAGE_PATH": str(stage)}
    image = path_here(python.image or "", here)
    if python.image and is_file(image):
        if not Path(image).is_file():
            return Finding("FAIL", f"the image {image} does not exist", SETUP)
        return _in_image(plan, folder, image, here)
    if python.image:
        return Finding("warn", f"the image {image} is in a registry: only a job can check it")
    path = path_here(python.path or "python3", here)
    interpreter = os.environ.get("FTGEN_PYTHON") or (f"{path}/bin/python" if python.kind == "venv" else path)
    run("bash", folder / f"{plan.name}.sh", "--unpack", folder)
    status, said = run(interpreter, folder / f"{plan.name}.py", "packages", STAGE_PATH=str(stage))
    hint = SETUP if python.kind == "venv" else "activate the environment that has NeMo"
    return _packages(interpreter, status, said, hint)


def _packages(what: str, status: int, said: str, hint: str) -> Finding:
    """What the command `packages` of a job's entrypoint said."""
    if status == 0:
        return Finding("ok", f"{what} has the packages that the job needs")
    lines = [line.split("ftgen: error: ", 1)[1] for line in said.splitlines() if "ftgen: error: " in line]
    return Finding("FAIL", f"{what}: {'; '.join(lines) or _last_line(said)}", hint)


def _in_image(plan: Plan, folder: Path, image: str, here: dict[str, str]) -> Finding:
    """Check the packages in an image. The script is unpacked in STAGE_PATH, which nodes and images see."""
    only_a_job = f"the image {image} exists; its packages could not be checked from here"
    if plan.python.kind == "container" and "--container-image" not in run("srun", "--help")[1]:
        return Finding("warn", f"{only_a_job}: this srun has no pyxis", "run this where jobs are submitted")
    with tempfile.TemporaryDirectory(prefix=".ftgen-doctor-", dir=here["STAGE_PATH"]) as code:
        run("bash", folder / f"{plan.name}.sh", "--unpack", code)
        status, said = run(*check_command(plan, image, Path(code), here), timeout_s=WAIT_S + 60 * MINUTES)
    if status and "ftgen: " not in said:  # the check did not start
        return Finding("warn", f"{only_a_job}: {_reason(said)}", "the job checks them when it starts")
    return _packages(f"the image {image}", status, said, "`ftgen list --images` says which images fit")


def _sources(plans: list[Plan], stage: Path) -> Iterator[Finding]:
    for source in dict.fromkeys(source for plan in plans for source in plan.sources):
        if (stage / source.folder / ".ftgen-commit").is_file():
            yield Finding("ok", f"{stage / source.folder} exists")
        else:
            yield Finding("FAIL", f"{source.url} at {source.commit[:12]} is not in {stage / source.folder}", SETUP)


def _last_line(text: str) -> str:
    return text.splitlines()[-1] if text else "no message"
