"""What jobs would download from the Hugging Face hub, whether the hub gives it, and downloading it before they run.

In: `Plan`s and their rendered scripts. Out: `Finding`s, or an exit code. The token is sent only to the hub.

Environment: HF_TOKEN, HF_TOKEN_PATH, HF_HOME, XDG_CACHE_HOME, HF_ENDPOINT, HF_HUB_OFFLINE; FTGEN_PYTHON for the download.
"""

import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ftgen.cluster.finding import TIMEOUT_S, Finding, run
from ftgen.plan.plan import Plan
from ftgen.script.render import render


def download(plans: list[Plan]) -> int:
    """Run `SCRIPT --download` of each plan, in this terminal. Exit code of the last one that failed, or 0."""
    environment = dict(os.environ)
    if find_spec("huggingface_hub"):
        environment.setdefault("FTGEN_PYTHON", sys.executable)
    status = 0
    with tempfile.TemporaryDirectory(prefix="ftgen-download-") as folder:
        for plan in plans:
            for name, text in render(plan).items():
                Path(folder, name).write_text(text, encoding="utf-8")
            script = Path(folder, f"{plan.name}.sh")
            status = subprocess.run(["bash", script, "--download"], env=environment, check=False).returncode or status
    return status


def missing(plan: Plan, folder: Path, stage: Path) -> list[str] | str:
    """What a job of the plan would have to download: lines `<kind> <repository> <revision>: <files>`.

    A text says why that is not known. `folder` has the rendered script, whose entrypoint is asked.
    """
    run("bash", folder / f"{plan.name}.sh", "--unpack", folder)
    status, said = run(sys.executable, folder / f"{plan.name}.py", "missing", STAGE_PATH=str(stage))
    lines = [line for line in said.splitlines() if line.startswith(("model ", "dataset "))]
    return lines if lines or status == 0 else said


def findings(plans: list[Plan], lacking: dict[str, list[str] | str]) -> Iterator[Finding]:
    """What each plan has to download, as `missing` says. The hub is asked once for each repository."""
    asked: set[str] = set()
    for plan in plans:
        lines = lacking[plan.name]
        if isinstance(lines, str):
            yield Finding("warn", f"{plan.name}: what its job has to download is not known: {lines[-200:]}")
            continue
        if not lines:
            yield Finding("ok", f"{plan.name}: weights and data are here: its job needs neither a token nor a network")
        for line in lines:
            if (os.environ | plan.environment).get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
                what = f"{plan.name}: HF_HUB_OFFLINE is set, and this is missing: {line}"
                yield Finding("FAIL", what, _download_hint(plan))
            elif line not in asked:
                kind, repository, _ = line.split(maxsplit=2)
                yield _repository(kind, repository, kind == "model" and plan.checkpoint.gated, _download_hint(plan))
            asked.add(line)


def _download_hint(plan: Plan) -> str:
    return f"where there is a network: bash {plan.name}.sh --download"


def _token() -> str:
    """The token that huggingface_hub finds; "" if there is none."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = os.environ.get("HF_TOKEN_PATH") or f"{os.environ.get('HF_HOME') or f'{cache}/huggingface'}/token"
    file = Path(os.path.expandvars(path)).expanduser()
    given = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    return (given or (file.read_text(encoding="utf-8") if file.is_file() else "")).strip()


def _repository(kind: str, name: str, gated: bool, download_hint: str) -> Finding:
    """Whether the token can read a repository: asks the hub for a small file that every repository has."""
    token, hub = _token(), (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if gated and not token:
        what = f"{name} is gated, and there is no Hugging Face token"
        return Finding("FAIL", what, "export HF_TOKEN=<your token>, or run hf auth login")
    path, file = (f"datasets/{name}", "README.md") if kind == "dataset" else (name, "config.json")
    request = urllib.request.Request(f"{hub}/{path}/resolve/main/{file}", method="HEAD")  # noqa: S310
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310 - https, or HF_ENDPOINT
            return Finding("ok", f"the hub gives access to {name}" + (" with your token" if token else ""))
    except urllib.error.HTTPError as error:
        return _refusal(name, error.code, bool(token), error.headers.get("X-Error-Code", ""))
    except OSError as error:
        reason = getattr(error, "reason", error)
        return Finding("warn", f"{hub} cannot be reached from this machine ({reason})", download_hint)


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
