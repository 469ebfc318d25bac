"""Build a directory once, however many jobs and ranks need it, and publish it only when it is complete.

In: its path (`place`), its source, and a function that builds it. Out: the path of the finished directory.

    ensure(place, source, build)

`build(staging)` fills a staging directory beside `place`. The staging directory gets a manifest and is renamed to
`place`, so a directory at `place` is always complete. It is used only if its manifest has the same source and its
files are unchanged; otherwise it is renamed, never deleted. One process builds (see claim.py). The others wait and
use the result. If the builder dies, the next process starts again.

In <parent of place>:  <name>/  .<name>.claims/<n>/  .<name>.staging-<n>/  <name>.untrusted-<time>/
"""

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from runtime.guard import manifest
from runtime.guard.claim import Claim, Watch
from runtime.guard.manifest import Source
from runtime.job import sharing
from runtime.job.errors import JobError, causes
from runtime.job.progress import say

REMIND_S = 60.0  # between two progress lines of a waiting process
POLL_S = 2.0  # longest time between two looks at the claim
FULL = {errno.ENOSPC, errno.EDQUOT}
DENIED = {errno.EACCES, errno.EPERM}
GIB = 1 << 30

Build = Callable[[Path], dict[str, Any] | None]


def ensure(place: Path, source: Source, build: Build, *, need_bytes: int | Callable[[], int] = 0) -> Path:
    """The directory `place`; `build` makes it unless it already exists. Before, `need_bytes` must be free on the disk.

    `build` may return its origin, which the manifest records but nothing compares. JobError: the directory cannot be
    written, or the disk is full. SIGTERM while building: SystemExit(143).
    """
    if manifest.flaw(place, source) is None:
        return place
    claims = place.parent / f".{place.name}.claims"
    make_directory(claims)
    while claim := _next_claim(place, source, claims):
        with _held(claim):
            if manifest.flaw(place, source) is None or _make(place, source, build, need_bytes, claim):
                break
        say(f"another process took over while this one was building {place}: waiting for it")
    return place


def require_space(directory: Path, need_bytes: int, what: str) -> None:
    """JobError unless `need_bytes` are free on the file system. A quota is not seen here; writing fails later."""
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise JobError(
            f"{what} needs {need_bytes / GIB:.1f} GiB in {directory}, but only {free / GIB:.1f} GiB are free",
            "free some space there, or set STAGE_PATH to a directory on a larger file system",
        )


def staging_of(place: Path, generation: int) -> Path:
    """The staging directory of claim number `generation`."""
    return place.parent / f".{place.name}.staging-{generation}"


def _next_claim(place: Path, source: Source, claims: Path) -> Claim | None:
    """Wait for the claim to build. None if another process has built the directory meanwhile."""
    watch, begin = Watch(claims), time.monotonic()
    said: float | None = None
    while True:
        if claim := watch.claim():
            return claim
        now = time.monotonic()
        if said is None or now - said > REMIND_S:
            say(f"waiting for {place}: {watch.holder()} is building it ({now - begin:.0f} s so far)")
            said = now
        time.sleep(min(POLL_S, 0.05 + (now - begin) / 10))
        if (place / manifest.NAME).exists() and manifest.flaw(place, source) is None:
            return None


def _make(place: Path, source: Source, build: Build, need_bytes: int | Callable[[], int], claim: Claim) -> bool:
    """Build and publish. False if another process took over meanwhile."""
    _sweep(place, claim)
    staging = staging_of(place, claim.generation)
    try:
        with _plain_disk_errors(place.parent):
            set_aside(place, source)
            if need := need_bytes() if callable(need_bytes) else need_bytes:
                require_space(place.parent, need, place.name)
            staging.mkdir()
            origin = build(staging)
            manifest.write(staging, source, {"user": sharing.user_name()} | (origin or {}))
            sharing.share_tree(staging)
            return _publish(staging, place, source, claim)
    except Exception:
        if claim.is_current():
            raise
        return False  # the process that took over has removed our staging directory, and builds the same
    finally:
        _remove(staging)


def _publish(staging: Path, place: Path, source: Source, claim: Claim) -> bool:
    while claim.is_current():
        try:
            staging.rename(place)  # fails if `place` exists
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
                raise
            if manifest.flaw(place, source) is None:
                return True  # an owner that counted as dead woke up and was faster
            set_aside(place, source)
        else:
            manifest.sync(place.parent)
            return True
    return False


def set_aside(place: Path, source: Source, *, thorough: bool = False) -> None:
    """If the directory at `place` has a flaw, rename it and print why. `thorough` reads every byte."""
    flaw = manifest.flaw(place, source, thorough=thorough)
    if flaw is None or not os.path.lexists(place):
        return
    aside = place.with_name(f"{place.name}.untrusted-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    place.rename(aside)
    if manifest.flaw(aside, source, thorough=thorough) is None:  # another process published a good one meanwhile
        aside.rename(place)
        return
    say(f"{place} is not used: {flaw}. It was moved to {aside}, which you can delete", any_rank=True)


def _sweep(place: Path, claim: Claim) -> None:
    """Remove the staging directories of dead owners."""
    for staging in place.parent.glob(f".{place.name}.staging-*"):
        number = staging.name.rpartition("-")[2]
        if number.isdigit() and int(number) < claim.generation:
            _remove(staging)
    for trash in place.parent.glob(f".{place.name}.trash-*"):
        shutil.rmtree(trash, ignore_errors=True)


def _remove(staging: Path) -> None:
    """Rename, then remove: an owner that wakes up meanwhile must not publish a half-removed directory."""
    trash = staging.with_name(f"{staging.name.replace('.staging-', '.trash-')}-{os.getpid()}")
    try:
        staging.rename(trash)
    except OSError:
        return
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def _held(claim: Claim) -> Iterator[None]:
    """Release the claim at the end of the block, also after an exception or SIGTERM."""
    with _sigterm_ends_the_block():
        try:
            yield
        finally:
            claim.release()


@contextmanager
def _sigterm_ends_the_block() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(_signal: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(143)  # a forked child must not clean up
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm may send several; they must not interrupt the clean-up
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_directory(directory: Path) -> None:
    """Create a directory that this process can write to. JobError: that is not possible."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_create(directory, error) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise _cannot_create(directory / "1", PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _cannot_create(path: Path, error: OSError) -> JobError:
    """The error for a path that this user cannot make or change. It names whose folder that is."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    what, hint = f"cannot create {path}: {error.strerror}", "set STAGE_PATH to a directory that you can write to"
    owner = sharing.owner_of(folder)
    if error.errno in DENIED and owner != sharing.user_name():
        what += f": {folder} belongs to {owner}"
        hint = f"ask {owner} to run: find {folder} -type d -user {owner} -exec chmod g+rwxs {{}} +. Or {hint}"
    return JobError(what, hint)


@contextmanager
def _plain_disk_errors(directory: Path) -> Iterator[None]:
    """Turn an error for a full disk, or for a folder of another user, into a JobError, however deep it was raised."""
    try:
        yield
    except Exception as error:
        if is_disk_error(error):
            raise JobError(
                f"the disk of {directory} is full, or your quota is used up",
                "free some space there, or set STAGE_PATH to a directory on a larger file system",
            ) from error
        failed = [cause for cause in causes(error) if isinstance(cause, OSError)]
        denied = [cause for cause in failed if cause.errno in DENIED and str(cause.filename).startswith(str(directory))]
        if denied:
            raise _cannot_create(Path(denied[0].filename), denied[0]) from error
        raise


def is_disk_error(error: BaseException) -> bool:
    """Whether the disk or a quota is full, however deep in a library the error was raised."""
    return any(isinstance(cause, OSError) and cause.errno in FULL for cause in causes(error))
