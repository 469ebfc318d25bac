"""A directory that is published once, for all who ask. In: its place and how to build it. Out: the directory, finished.

    ensure(place, source, build)

`build(staging)` fills a staging directory beside the place; it gets a manifest and reaches its place by one rename, so
that what stands there is whole or is not there. Only a directory whose manifest names the same source and the files as
they are is ever used; anything else found in the place is renamed aside, never deleted. One process builds (`claim`),
the others wait for it and use its result; where it died, the next one starts over.

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
from runtime.job.errors import JobError
from runtime.job.progress import say

REMIND_S = 60.0  # between two lines of one who waits
POLL_S = 2.0  # between two looks at the claim, once the first seconds are over
FULL = {errno.ENOSPC, errno.EDQUOT}
GIB = 1 << 30

Build = Callable[[Path], dict[str, Any] | None]


def ensure(place: Path, source: Source, build: Build, *, need_bytes: int | Callable[[], int] = 0) -> Path:
    """The directory `place`, made by `build` unless it is there already; `need_bytes` of room are asked for first.

    `build` may return what it learned of the origin: it is recorded in the manifest, and nothing is compared with it.
    JobError: the directory cannot be written, the disk is too small or fills up. SIGTERM meanwhile: SystemExit(143).
    """
    if manifest.flaw(place, source) is None:
        return place
    claims = place.parent / f".{place.name}.claims"
    _make_directory(claims)
    while claim := _next_claim(place, source, claims):
        with _held(claim):
            if manifest.flaw(place, source) is None or _make(place, source, build, need_bytes, claim):
                break
        say(f"another process took over while {place} was being made: waiting for it")
    return place


def require_space(directory: Path, need_bytes: int, what: str) -> None:
    """JobError unless the directory's file system has room for `need_bytes` (a quota shows only when it is hit)."""
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise JobError(
            f"{what} needs {need_bytes / GIB:.1f} GiB in {directory}, and {free / GIB:.1f} GiB are free",
            "make room there, or set STAGE_PATH to a directory on a larger file system",
        )


def staging_of(place: Path, generation: int) -> Path:
    """Where owner `generation` builds."""
    return place.parent / f".{place.name}.staging-{generation}"


def _next_claim(place: Path, source: Source, claims: Path) -> Claim | None:
    """Wait until it is our turn to build; None once somebody else has."""
    watch, begin = Watch(claims), time.monotonic()
    said: float | None = None
    while True:
        if claim := watch.claim():
            return claim
        now = time.monotonic()
        if said is None or now - said > REMIND_S:
            say(f"waiting for {place}: {watch.holder()} is making it ({now - begin:.0f} s so far)")
            said = now
        time.sleep(min(POLL_S, 0.05 + (now - begin) / 10))
        if (place / manifest.NAME).exists() and manifest.flaw(place, source) is None:
            return None


def _make(place: Path, source: Source, build: Build, need_bytes: int | Callable[[], int], claim: Claim) -> bool:
    """Build and publish; False when another process took over meanwhile."""
    _sweep(place, claim)
    staging = staging_of(place, claim.generation)
    try:
        with _plain_disk_errors(place.parent):
            set_aside(place, source)
            if need := need_bytes() if callable(need_bytes) else need_bytes:
                require_space(place.parent, need, place.name)
            staging.mkdir()
            origin = build(staging)
            manifest.write(staging, source, origin or {})
            return _publish(staging, place, source, claim)
    except Exception:
        if claim.is_current():
            raise
        return False  # the one who took over removed our staging directory under our feet: its result is as good
    finally:
        _remove(staging)


def _publish(staging: Path, place: Path, source: Source, claim: Claim) -> bool:
    while claim.is_current():
        try:
            staging.rename(place)  # fails when something is there
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
                raise
            if manifest.flaw(place, source) is None:
                return True  # an owner that we had given up woke and was faster
            set_aside(place, source)
        else:
            manifest.sync(place.parent)
            return True
    return False


def set_aside(place: Path, source: Source, *, thorough: bool = False) -> None:
    """Rename what is in the place and cannot be trusted, and say so; `thorough` reads all of it."""
    flaw = manifest.flaw(place, source, thorough=thorough)
    if flaw is None or not os.path.lexists(place):
        return
    aside = place.with_name(f"{place.name}.untrusted-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    place.rename(aside)
    if manifest.flaw(aside, source, thorough=thorough) is None:  # another owner published between the look and the rename
        aside.rename(place)
        return
    say(f"{place} is not used: {flaw}. It was moved to {aside}, which nothing needs any more", any_rank=True)


def _sweep(place: Path, claim: Claim) -> None:
    """Remove what dead owners were building."""
    for staging in place.parent.glob(f".{place.name}.staging-*"):
        number = staging.name.rpartition("-")[2]
        if number.isdigit() and int(number) < claim.generation:
            _remove(staging)
    for trash in place.parent.glob(f".{place.name}.trash-*"):
        shutil.rmtree(trash, ignore_errors=True)


def _remove(staging: Path) -> None:
    """Remove by way of a rename: an owner that wakes up halfway must not publish what is left."""
    trash = staging.with_name(f"{staging.name.replace('.staging-', '.trash-')}-{os.getpid()}")
    try:
        staging.rename(trash)
    except OSError:
        return
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def _held(claim: Claim) -> Iterator[None]:
    """The claim is released however the block ends, by SIGTERM too."""
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
            os._exit(143)  # a forked child has no right to clean up
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm may send several: none of them ends the cleaning up
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(
            f"{directory} cannot be made: {error.strerror}", "set STAGE_PATH to a directory that you can write to"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise JobError(f"{directory} cannot be written to", "set STAGE_PATH to a directory that you can write to")


@contextmanager
def _plain_disk_errors(directory: Path) -> Iterator[None]:
    """A full disk is one line, however deep in a library it was met."""
    try:
        yield
    except Exception as error:
        if not any(isinstance(cause, OSError) and cause.errno in FULL for cause in _causes(error)):
            raise
        raise JobError(
            f"the disk of {directory} is full, or your quota there is used up",
            "make room there, or set STAGE_PATH to a directory on a larger file system",
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
