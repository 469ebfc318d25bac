"""Download a repository from the Hugging Face hub, once for all jobs.

In: a `Repository`. Out: a folder with its files, or a JobError.

The guard publishes the folder, so of many jobs and ranks one downloads and the others wait. The bytes go into a folder
beside it, which stays if the download is interrupted: the next one continues in the middle of a file. huggingface_hub
does the requests: the token, HF_ENDPOINT, the proxies and the certificates are its matter. Its own download is not used,
because version 1.33 begins an interrupted file again, and no version compares the checksums of the hub.

Environment: what huggingface_hub reads, such as HF_TOKEN, HF_TOKEN_PATH, HF_ENDPOINT, HTTPS_PROXY.
"""

import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple

from runtime.guard import publish
from runtime.guard.manifest import sha256_of
from runtime.hub import errors, find
from runtime.hub.repository import Repository
from runtime.job.errors import JobError
from runtime.job.progress import say, timed

THREADS = 8  # files that are downloaded at the same time, as huggingface_hub's snapshot_download does
ANSWER_S = 10.0  # longest time until the hub answers a request
LISTING_S = 20.0  # longest time until the list of the files is there, with all addresses of the hub that are tried
REPORT_S = 15.0  # between two progress lines
GB = 1e9


class File(NamedTuple):
    """A file of a repository. A mirror can leave out size and hashes."""

    path: str
    size: int | None  # bytes
    sha256: str | None  # of a large file
    git_sha1: str | None  # of a small file: of its Git blob


class Listing(NamedTuple):
    """The files of a repository that a job reads, at one commit."""

    commit: str
    files: tuple[File, ...]


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
    there = _size(partial) if partial.exists() else 0
    return max(0, sum(file.size or 0 for file in listing.files) - there)


@cache
def _listing(repository: Repository, script: str) -> Listing:
    """Ask the hub for the commit and the files. It is asked once: a commit that comes meanwhile must not matter."""
    if find.is_offline():
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

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error:
        raise error
    return answer


def _file(sibling: Any) -> File:
    lfs = sibling.lfs or {}
    return File(sibling.rfilename, sibling.size, lfs.get("sha256"), None if lfs else sibling.blob_id)


def _build(repository: Repository, script: str, place: Path, staging: Path) -> dict[str, Any]:
    """Download into the partial folder, and link its files into the staging folder. Returns the commit."""
    listing = _listing(repository, script)
    partial = _partial(place, listing)
    partial.mkdir(parents=True, exist_ok=True)
    size = sum(file.size or 0 for file in listing.files)
    with timed(f"downloading {repository}: {len(listing.files)} files, {size / GB:.1f} GB"):
        _download(repository, script, listing, partial)
    if lacking := repository.missing(partial):
        raise JobError(f"{repository} has no {', '.join(lacking)}", "use another repository or revision")
    for file in listing.files:
        _link(partial / file.path, staging / file.path)
    return {"commit": listing.commit}


def _download(repository: Repository, script: str, listing: Listing, partial: Path) -> None:
    """Download the files in threads. They are daemons: a signal must end the process, and not after 5 GB more."""
    waiting: queue.SimpleQueue[File] = queue.SimpleQueue()
    for file in sorted(listing.files, key=lambda file: file.size or 0):  # a refusal shows at once
        waiting.put(file)
    ended: queue.Queue[Exception | None] = queue.Queue()

    def work() -> None:
        try:
            while not waiting.empty():
                _download_file(repository, script, listing.commit, waiting.get_nowait(), partial)
        except queue.Empty:
            pass
        except Exception as error:
            ended.put(error)
            return
        ended.put(None)

    for _ in range(THREADS):
        threading.Thread(target=work, daemon=True).start()
    _wait_for_threads(ended, partial, sum(file.size or 0 for file in listing.files))


def _wait_for_threads(ended: "queue.Queue[Exception | None]", partial: Path, size: int) -> None:
    """Wait until all threads have ended, or raise the first error of one. Prints progress lines."""
    running, said = THREADS, time.monotonic()
    while running:
        try:
            error = ended.get(timeout=REPORT_S)
        except queue.Empty:
            error = None
        else:
            if error:
                raise error
            running -= 1
        if time.monotonic() - said >= REPORT_S:
            said = time.monotonic()
            say(f"downloaded {_size(partial) / GB:.1f} of {size / GB:.1f} GB")


def _download_file(repository: Repository, script: str, commit: str, file: File, partial: Path) -> None:
    """Download one file, or the rest of it. Its name in the partial folder has .part until its checksum is right."""
    target = partial / file.path
    part = target.with_name(f"{target.name}.part")
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    while not _get(repository, script, commit, file, part):
        say(f"the connection broke: {file.path} goes on from {_bytes(part) / GB:.2f} GB", any_rank=True)
    if flaw := _flaw(part, file):
        part.unlink()
        raise JobError(
            f"{repository}: {file.path} has arrived damaged: {flaw}",
            "try again: this file is downloaded again; if it comes again, the mirror of HF_ENDPOINT or the proxy changes it",
        )
    part.rename(target)


def _get(repository: Repository, script: str, commit: str, file: File, part: Path) -> bool:
    """Download the file, or what comes after the bytes that are there. False: the connection broke, after more bytes."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository.name, file.path, repo_type=repository.kind, revision=commit)
    there = _bytes(part) if file.sha256 and file.size else 0
    try:
        with part.open("r+b" if there else "wb") as opened, errors.plain_errors(repository, script):
            opened.seek(there)
            http_get(url, opened, resume_size=there, headers=build_hf_headers(), expected_size=file.size)
    except JobError:
        if file.sha256 and file.size and there < _bytes(part) < file.size:
            return False
        raise
    return True


def _flaw(path: Path, file: File) -> str | None:
    """What is wrong with the bytes, by the hub's own size and hash."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"it has {size} bytes, not {file.size}"
    if file.sha256 and (found := sha256_of(path)) != file.sha256:
        return f"its SHA-256 is {found}, not {file.sha256}"
    if file.git_sha1:
        content = path.read_bytes()
        found = sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest()
        if found != file.git_sha1:
            return f"its Git hash is {found}, not {file.git_sha1}"
    return None


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


def _size(folder: Path) -> int:
    """Bytes of the files in the folder."""
    return sum(_bytes(path) for path in folder.rglob("*"))


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0  # a thread has renamed it
