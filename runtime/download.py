"""Download what a job reads from the Hugging Face hub, before it runs, where there is a network.

In: a plan. Out: folders below $STAGE_PATH/HF_ckpt/downloads, and lines that say what is where.

This needs Python 3.10 and huggingface_hub: no framework, no GPU, no Slurm. What it downloads, all jobs find: they need
neither a token nor a network. What is made of it (a converted checkpoint, examples) counts too: then nothing is missing.
"""

import json
import os
from pathlib import Path
from typing import Any

from runtime.data import prepare
from runtime.guard import manifest
from runtime.hub import find
from runtime.hub.fetch import fetch
from runtime.hub.repository import Repository
from runtime.hub.transfer import GB
from runtime.job.progress import say
from runtime.weights import checkpoint, hub

Plan = dict[str, Any]


def download(plan: Plan) -> int:
    """Download what is missing; exit code 0. JobError: no access, no network, no room."""
    while variable := find.offline_variable():
        say(f"{variable} is set: that holds for jobs, not for a download")
        del os.environ[variable]
    lines = [*_weights(plan), *_data(plan)]
    for line in lines:
        say(line)
    say(f"jobs of {plan['name']}.sh need neither a token nor a network for weights and data")
    return 0


def tell_missing(plan: Plan) -> int:
    """Print a line for each repository that is missing. Exit code 1 if there is one."""
    lacking = missing(plan)
    for repository in lacking:
        print(f"{repository.kind} {repository.name} {repository.revision}: {find.what_is_missing(repository)}", flush=True)
    return 1 if lacking else 0


def missing(plan: Plan) -> list[Repository]:
    """The repositories that a job of the plan would have to download."""
    return [repository for repository in _repositories(plan) if not find.find(repository)]


def _repositories(plan: Plan) -> list[Repository]:
    """What a job of the plan reads from the hub."""
    from_hub = plan["checkpoint"]["source"] == "hub" and not checkpoint.converted(plan)
    return [*([hub.repository(plan)] if from_hub else []), *prepare.repositories(plan)]


def _weights(plan: Plan) -> list[str]:
    kind = plan["checkpoint"]["source"]
    if checkpoint.converted(plan):
        return [f"weights: the converted checkpoint exists: {checkpoint.directory(plan)}"]
    if kind == "random":
        return ["weights: random, the job makes them: nothing to download"]
    if kind == "directory":
        folder = checkpoint.user_directory(plan)
        known = "" if folder.is_dir() else ", which does not exist on this machine"
        return [f"weights: the directory {folder}{known}: nothing to download"]
    return [_fetched("weights", hub.repository(plan), plan)]


def _data(plan: Plan) -> list[str]:
    wanted = prepare.repositories(plan)
    if not wanted:
        return [f"data: {plan['data']['kind']}: nothing to download"]
    return [_fetched("data", repository, plan) for repository in wanted]


def _fetched(what: str, repository: Repository, plan: Plan) -> str:
    """Download one repository. Returns a line with its commit, number of files, size and folder."""
    there = find.find(repository)
    folder = fetch(repository, plan["name"], into_home=True)
    sizes = _sizes(folder)
    how = {True: "was there", False: "copied from your hub cache" if there else "downloaded"}[folder == there]
    commit = find.commit(folder)[:12]
    return f"{what}: {repository} ({commit}): {how}: {len(sizes)} files, {sum(sizes) / GB:.3f} GB in {folder}"


def _sizes(folder: Path) -> list[int]:
    """Sizes of the files that the hub has."""
    file = folder / manifest.NAME
    if file.is_file():
        return [entry["size"] for entry in json.loads(file.read_text())["files"].values()]
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
