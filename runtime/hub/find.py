"""Find a repository of the hub on this machine, without a network, a token or huggingface_hub.

In: a `Repository`. Out: a folder with its files, or what is missing.

Two kinds of places are looked at: the folder that `fetch` publishes, and hub caches, whose layout huggingface_hub
documents as <cache>/models--org--name/{refs/<revision>,snapshots/<commit>/<file>}. A snapshot is used only if it has
all that a job reads, because an interrupted download leaves a snapshot with some of the files.

Environment: HF_HOME (in a job $STAGE_PATH/HF_ckpt), STAGE_PATH, HF_HUB_CACHE; FTGEN_HUB_CACHE, the hub cache of the
user who submitted the job; HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE.
"""

import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from runtime.guard import manifest
from runtime.hub.repository import Repository

SHOWN = 6  # number of missing files that an error names


def find(repository: Repository) -> Path | None:
    """A folder with all the files that a job reads, or None."""
    return published(repository) or in_cache(repository)


def published(repository: Repository) -> Path | None:
    """The folder that `fetch` published, or None."""
    folder = place(repository)
    return folder if manifest.flaw(folder, source(repository)) is None else None


def in_cache(repository: Repository) -> Path | None:
    """A complete snapshot in a hub cache, or None. Its name is the commit.

    Without `needed`, nobody knows whether a snapshot is complete.
    """
    if not repository.needed:
        return None
    complete = (folder for folder in snapshots(repository) if not repository.missing(folder))
    return next(complete, None)


def commit(folder: Path) -> str:
    """The commit that a folder of `find` has."""
    try:
        return str(json.loads((folder / manifest.NAME).read_text())["origin"]["commit"])
    except FileNotFoundError:
        return folder.name  # a snapshot in a hub cache


def place(repository: Repository) -> Path:
    """The folder that `fetch` publishes. Its name has a hash of `needed`: two plans may read other files of a data set."""
    revision = repository.revision.replace("/", "--")
    files = sha256(json.dumps(repository.needed).encode()).hexdigest()[:6]
    return home() / "downloads" / f"{repository.kind}s" / f"{repository.name}@{revision}-{files}"


def source(repository: Repository) -> dict[str, Any]:
    """What identifies the published folder. Without `wanted`: a new ftgen must not download 100 GB for a small file."""
    asked = {"repository": repository.name, "type": repository.kind, "revision": repository.revision}
    return {"kind": "download", **asked, "needed": repository.needed}


def home() -> Path:
    """The folder of all that jobs take from the hub."""
    return Path(os.environ.get("HF_HOME") or Path(os.environ.get("STAGE_PATH") or Path.cwd(), "HF_ckpt"))


def caches() -> list[Path]:
    """The hub caches to look at: that of the jobs, then those of the site and of the user."""
    others = (os.environ.get(name) for name in ("HF_HUB_CACHE", "FTGEN_HUB_CACHE"))
    paths = [home() / "hub", *(Path(os.path.expandvars(path)).expanduser() for path in others if path)]
    return list(dict.fromkeys(paths))


def snapshots(repository: Repository) -> list[Path]:
    """The folders of this revision in the hub caches, complete or not."""
    found = []
    for cache in caches():
        folder = cache / f"{repository.kind}s--{repository.name.replace('/', '--')}"
        try:
            name = (folder / "refs" / repository.revision).read_text().strip()
        except OSError:
            name = repository.revision
        if name and (snapshot := folder / "snapshots" / name).is_dir():
            found.append(snapshot)
    return found


def what_is_missing(repository: Repository) -> str:
    """Names of the missing files, and the folder that lacks them, as text for an error."""
    folder = next(iter(snapshots(repository)), place(repository))
    names = repository.missing(folder)
    if not names:
        return f"there is no {folder}"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{folder} lacks {', '.join(names[:SHOWN])}{more}"


def offline_variable() -> str:
    """The variable by which the user forbids the hub, or an empty text. These two count for huggingface_hub."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}), "")


def go_offline() -> None:
    """Forbid the hub from now on, unless HF_HUB_OFFLINE is set: libraries must not wait for a network that is not there."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "huggingface_hub.constants" in sys.modules:
        sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = bool(offline_variable())  # type: ignore[attr-defined]
