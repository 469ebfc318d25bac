"""Checks on a login node whether jobs will run, before they wait in the queue.

In: a `Site` and `Plan`s. Out: `Finding`s. The checks write only temporary folders, and submit no batch job. pyxis runs an
image only on a node: to look into it, srun asks for one task, and gives up if no node is free. The checks send the token
only to the Hugging Face hub.

Environment: STAGE_PATH, FTGEN_PYTHON, HF_TOKEN, HF_TOKEN_PATH, HF_HOME, HF_ENDPOINT.
"""

import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ftgen.cluster.image import MINUTES, WAIT_S, check_command
from ftgen.plan.images import is_file
from ftgen.plan.plan import Plan
from ftgen.plan.resolve import resolve
from ftgen.script.paths import path_here
from ftgen.script.render import render
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec

GIB = 1 << 30
TIMEOUT_S = 30.0
SETUP = "submit the script of `ftgen setup --site FILE SPEC`"
# Types of file systems in /proc/mounts that other nodes do not see.
LOCAL = {"btrfs", "ext2", "ext3", "ext4", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


class Finding(NamedTuple):
    """The result of one check."""

    verdict: str  # "ok", "warn" (the job may run), "FAIL"
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:5}  {self.what}" + (f"\n       hint: {self.hint}" if self.hint else "")


def examine(site: Site, plans: list[Plan]) -> Iterator[Finding]:
    """Run every check. Without plans, the checks are for a LoRA of the recipe on one node."""
    if not plans:
        spec = Spec.model_validate({"scheme": "lora", "precision": "bf16", "gpus": site.gpus_per_node or 8})
        plans = [resolve(spec, site, name="one_node", spec_file="one_node.toml")]
    stage = Path(os.environ.get("STAGE_PATH") or path_here(site.stage_path or "", os.environ) or Path.cwd()).absolute()
    reachable = _slurm()
    yield reachable
    yield from _share_of_a_node(site)
    yield from _stage_path(stage, site, plans)
    with tempfile.TemporaryDirectory(prefix="ftgen-doctor-") as folder:
        for plan in plans:
            for name, text in render(plan).items():
                Path(folder, name).write_text(text, encoding="utf-8")
            if reachable.verdict == "ok":
                yield _request(plan, Path(folder, f"{plan.name}.sh"))
        yield _python(plans[0], Path(folder), stage)
    yield from _sources(plans, stage)
    for repository, gated in dict.fromkeys(
        (p.model.hf_id, p.checkpoint.gated) for p in plans if p.checkpoint.source == "hub"
    ):
        yield _model(repository, gated)


def _share_of_a_node(site: Site) -> Iterator[Finding]:
    """What a job that shares nodes may not expect. And the folder of Slurm's own output: without it, a job says nothing."""
    if not site.exclusive and not site.cpus_per_gpu:
        what = "exclusive = false without cpus_per_gpu: each GPU's task gets as many CPUs as Slurm gives, often one"
        yield Finding("warn", what, "set cpus_per_gpu in the site profile to the CPUs of a node / its GPUs")
    folder = site.output_folder
    if folder and "%" not in folder and not os.access(folder, os.W_OK):
        hint = "create it: Slurm does not, and a job without its output file ends with no word"
        yield Finding("FAIL", f"output_folder: {folder} is not a folder that you can write to", hint)


def _run(*command: str | Path, timeout_s: float = TIMEOUT_S, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command. The exit code is 127 if there is no such program, and 124 after the timeout."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, env=os.environ | environment
        )
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]}: no answer for {timeout_s:.0f} s"
    except OSError as error:
        return 127, f"{command[0]}: {error.strerror}"
    return done.returncode, (done.stdout + done.stderr).strip()


def _slurm() -> Finding:
    status, said = _run("scontrol", "ping")
    if status == 0 and "is UP" in said:
        return Finding("ok", f"Slurm answers: {_run('sinfo', '--version')[1]}")
    hint = "run this on a login node of the cluster" if status == 127 else "ask the operators of the cluster"
    return Finding("FAIL", f"Slurm does not answer: {_last_line(said)}", hint)


def _request(plan: Plan, script: Path) -> Finding:
    """Whether Slurm would accept the job. Nothing is submitted."""
    what = f"{plan.name}: {plan.nodes} x {plan.gpus_per_node} GPUs"
    status, said = _run("sbatch", "--test-only", script)
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
    missing = {p.checkpoint.place: p for p in plans if not (stage / "HF_ckpt/models" / p.checkpoint.place).exists()}
    return sum(2 * p.model.parameters * (1 if p.checkpoint.source == "directory" else 2) for p in missing.values())


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
    _run("bash", folder / f"{plan.name}.sh", "--unpack", folder)
    status, said = _run(interpreter, folder / f"{plan.name}.py", "packages", STAGE_PATH=str(stage))
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
    if plan.python.kind == "container" and "--container-image" not in _run("srun", "--help")[1]:
        return Finding("warn", f"{only_a_job}: this srun has no pyxis", "run this where jobs are submitted")
    with tempfile.TemporaryDirectory(prefix=".ftgen-doctor-", dir=here["STAGE_PATH"]) as code:
        _run("bash", folder / f"{plan.name}.sh", "--unpack", code)
        status, said = _run(*check_command(plan, image, Path(code), here), timeout_s=WAIT_S + 60 * MINUTES)
    if status and "ftgen: " not in said:  # the check did not start
        return Finding("warn", f"{only_a_job}: {_reason(said)}", "the job checks them when it starts")
    return _packages(f"the image {image}", status, said, "`ftgen list --images` says which images fit")


def _sources(plans: list[Plan], stage: Path) -> Iterator[Finding]:
    for source in dict.fromkeys(source for plan in plans for source in plan.sources):
        if (stage / source.folder / ".ftgen-commit").is_file():
            yield Finding("ok", f"{stage / source.folder} exists")
        else:
            yield Finding("FAIL", f"{source.url} at {source.commit[:12]} is not in {stage / source.folder}", SETUP)


def _token() -> str:
    """The token that huggingface_hub finds; "" if there is none."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token"))
    given = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    return (given or (file.read_text(encoding="utf-8") if file.is_file() else "")).strip()


def _model(repository: str, gated: bool) -> Finding:
    """Whether the token can read the model: asks the hub for a small file of it."""
    token, hub = _token(), (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if gated and not token:
        what = f"{repository} is gated, and there is no Hugging Face token"
        return Finding("FAIL", what, "export HF_TOKEN=<your token>, or run hf auth login")
    request = urllib.request.Request(f"{hub}/{repository}/resolve/main/config.json", method="HEAD")  # noqa: S310
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310 - https, or HF_ENDPOINT
            return Finding("ok", f"the hub gives access to {repository}" + (" with your token" if token else ""))
    except urllib.error.HTTPError as error:
        return _refusal(repository, error.code, bool(token), error.headers.get("X-Error-Code", ""))
    except OSError as error:
        reason = getattr(error, "reason", error)
        hint = "convert on a node with network, unless the nodes of the jobs have it"
        return Finding("warn", f"{hub} cannot be reached from this machine ({reason})", hint)


def _refusal(repository: str, status: int, token: bool, code: str) -> Finding:
    page = f"https://huggingface.co/{repository}"
    if status in (401, 403) and (code == "GatedRepo" or status == 403):
        return Finding(
            "FAIL",
            f"{repository} is gated, and the account of this token has no access ({status})",
            f"log in with the account of the token, request access on {page} and wait until you have it; "
            "a fine-grained token also needs the permission to read gated repositories",
        )
    if status == 401:
        what = "the hub does not accept the token" if token else "it is not public, and there is no token"
        hint = "create a token on https://huggingface.co/settings/tokens and export HF_TOKEN"
        return Finding("FAIL", f"{repository}: {what} (401)", hint)
    if status == 404:
        return Finding("FAIL", f"{repository} is not on the hub, or this token has no access to it (404)", f"look at {page}")
    return Finding("warn", f"{repository}: the hub answers {status}", "try again later")


def _last_line(text: str) -> str:
    return text.splitlines()[-1] if text else "no message"
