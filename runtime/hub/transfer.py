"""Download files of a repository, several at a time, and continue in the middle of a file that was interrupted.

In: the `File`s of a commit, and a folder. Out: the files in the folder, whose checksums are those of the hub.

huggingface_hub does the requests: the token, HF_ENDPOINT, the proxies and the certificates are its matter. Only its
function for one request is used, because its hf_hub_download begins an interrupted file again in version 1.33, and takes
a damaged file for good (tried over plain HTTP with 0.23.5, 0.36.2 and 1.33.0).
"""

import queue
import time
from collections.abc import Sequence
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

from runtime.guard.manifest import sha256_of
from runtime.hub import errors
from runtime.hub.repository import Repository
from runtime.job import signals
from runtime.job.errors import JobError
from runtime.job.progress import say

THREADS = 8  # files that are downloaded at the same time, as huggingface_hub's snapshot_download does
REPORT_S = 15.0  # between two progress lines
GB = 1e9


class File(NamedTuple):
    """A file of a repository. A mirror can leave out size and hashes."""

    path: str
    size: int | None  # bytes
    sha256: str | None  # of a large file
    git_sha1: str | None  # of a small file: of its Git blob


def download(repository: Repository, script: str, commit: str, files: Sequence[File], folder: Path) -> None:
    """Download the files into the folder. JobError: no access, no network, a file with another checksum.

    The threads are daemons: a signal must end the process at once, and not after another 5 GB.
    """
    waiting: queue.SimpleQueue[File] = queue.SimpleQueue()
    for file in sorted(files, key=lambda file: file.size or 0):  # a refusal shows at once
        waiting.put(file)
    ended: queue.Queue[Exception | None] = queue.Queue()

    def work() -> None:
        try:
            while not waiting.empty():
                _download_file(repository, script, commit, waiting.get_nowait(), folder)
        except queue.Empty:
            pass
        except Exception as error:
            ended.put(error)
            return
        ended.put(None)

    for _ in range(THREADS):
        signals.start_thread(work)
    _wait_for_threads(ended, folder, sum(file.size or 0 for file in files))


def _wait_for_threads(ended: "queue.Queue[Exception | None]", folder: Path, size: int) -> None:
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
            say(f"downloaded {size_of(folder) / GB:.1f} of {size / GB:.1f} GB")


def _download_file(repository: Repository, script: str, commit: str, file: File, folder: Path) -> None:
    """Download one file, or the rest of it. Its name has .part until its checksum is right."""
    target = folder / file.path
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


def size_of(folder: Path) -> int:
    """Bytes of the files in the folder."""
    return sum(_bytes(path) for path in folder.rglob("*"))


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0  # a thread has renamed it
