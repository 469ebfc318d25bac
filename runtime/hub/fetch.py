"""Download a repository from the Hugging Face hub, once for all jobs.

In: a `Repository`. Out: a folder with its files, or a JobError.

The guard publishes the folder, so of many jobs and ranks one downloads and the others wait. The bytes go into a folder
beside it, which stays if the download is interrupted, so the next one continues it (see transfer.py).

Environment: what huggingface_hub reads, such as HF_TOKEN, HF_TOKEN_PATH, HF_ENDPOINT, HTTPS_PROXY.
"""

import os
import queue
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from runtime.guard import publish
from runtime.hub import errors, find, transfer
from runtime.hub.repository import Repository
from runtime.job import signals
from runtime.job.errors import JobError
from runtime.job.progress import timed

ANSWER_S = 10.0  # longest time until the hub answers a request
LISTING_S = 20.0  # longest time until the list of the files is there, with all addresses of the hub that are tried


class Listing(NamedTuple):
    """The files of a repository that a job reads, at one commit."""

    commit: str
    files: tuple[transfer.File, ...]


def fetch(repository: Repository, script: str, *, into_home: bool = False) -> Path:
    """A folder with the repository's files. It is downloaded if it is not on this machine.

    `script` is the name of the job's script, for hints. `into_home` copies from a hub cache that other machines may not
    see. JobError: no access, no network, no room, a file with another checksum.
    """
    found = find.find(repository)
    if found and (not into_home or found.is_relative_to(find.home())):
        return found
    place = find.place(repository)
    if found:
        files = [path for path in found.rglob("*") if repository.wants(path.relative_to(found).as_posix())]
        need = sum(path.stat().st_size for path in files)
        publish.ensure(place, find.source(repository), lambda staging: _copy(found, files, staging), need_bytes=need)
        return place
    publish.ensure(
        place,
        find.source(repository),
        lambda staging: _build(repository, script, place, staging),
        need_bytes=lambda: bytes_to_download(repository, script),
    )
    for partial in _partials(place):
        shutil.rmtree(partial, ignore_errors=True)
    return place


def bytes_to_download(repository: Repository, script: str) -> int:
    """Bytes that `fetch` still has to download. JobError: the hub does not tell."""
    if find.find(repository):
        return 0
    listing = _listing(repository, script)
    partial = _partial(find.place(repository), listing)
    there = transfer.size_of(partial) if partial.exists() else 0
    return max(0, sum(file.size or 0 for file in listing.files) - there)


@cache
def _listing(repository: Repository, script: str) -> Listing:
    """Ask the hub for the commit and the files. It is asked once: a commit that comes meanwhile must not matter."""
    if find.offline_variable():
        raise errors.offline(repository, script)
    hub = _huggingface_hub()
    with errors.plain_errors(repository, script):
        info = _within(
            LISTING_S,
            lambda: hub.HfApi().repo_info(
                repository.name,
                repo_type=repository.kind,
                revision=repository.revision,
                files_metadata=True,
                timeout=ANSWER_S,
            ),
        )
    files = tuple(_file(sibling) for sibling in info.siblings or [] if repository.wants(sibling.rfilename))
    return Listing(str(info.sha), files)


def _huggingface_hub() -> Any:
    """The package, without its progress bars and warnings: those have URLs with signatures."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_ENABLE_HF_TRANSFER"] = "0"  # its unfinished files have holes, and the size of finished ones
    try:
        import huggingface_hub
    except ImportError as error:
        raise JobError(
            f"{sys.executable} has no huggingface_hub",
            "python3 -m venv FOLDER && FOLDER/bin/pip install huggingface_hub, then export FTGEN_PYTHON=FOLDER/bin/python",
        ) from error
    huggingface_hub.logging.set_verbosity_error()
    return huggingface_hub


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """The answer of `ask`. TimeoutError: it takes longer. A library's own limit holds for each address of a host anew."""
    answers: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    signals.start_thread(work)
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error:
        raise error
    return answer


def _file(sibling: Any) -> transfer.File:
    lfs = sibling.lfs or {}
    return transfer.File(sibling.rfilename, sibling.size, lfs.get("sha256"), None if lfs else sibling.blob_id)


def _build(repository: Repository, script: str, place: Path, staging: Path) -> dict[str, Any]:
    """Download into the partial folder, and link its files into the staging folder. Returns the commit."""
    listing = _listing(repository, script)
    partial = _partial(place, listing)
    partial.mkdir(parents=True, exist_ok=True)
    size = sum(file.size or 0 for file in listing.files)
    with timed(f"downloading {repository}: {len(listing.files)} files, {size / transfer.GB:.1f} GB"):
        transfer.download(repository, script, listing.commit, listing.files, partial)
    if lacking := repository.missing(partial):
        raise JobError(f"{repository} has no {', '.join(lacking)}", "use another repository or revision")
    for file in listing.files:
        _link(partial / file.path, staging / file.path)
    return {"commit": listing.commit}


def _link(source: Path, target: Path) -> None:
    """A second name, so that the partial folder stays whole until the folder is published. A move, where links fail."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        source.rename(target)


def _copy(snapshot: Path, files: list[Path], staging: Path) -> dict[str, Any]:
    """Copy files of a hub cache, where they are links."""
    with timed(f"copying {snapshot}"):
        for file in files:
            target = staging / file.relative_to(snapshot)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return {"commit": snapshot.name}


def _partial(place: Path, listing: Listing) -> Path:
    return place.parent / f".{place.name}.partial-{listing.commit[:12]}"


def _partials(place: Path) -> list[Path]:
    return list(place.parent.glob(f".{place.name}.partial-*"))
