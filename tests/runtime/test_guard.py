"""The guard: real processes that race, die, sleep and find rubbish. What is published is whole, and built by one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.guard import claim, manifest, publish
from runtime.job import sharing
from runtime.job.errors import JobError

ROOT = Path(__file__).parents[2]
SOURCE = {"kind": "test", "number": 1}

# A process that asks for the directory. Its build writes two files with a pause between, and a line into the log that
# all share; at the point named by STOP_AT it says so and waits for a file, so that the test can kill or stop it there.
PROGRAM = """
import os, sys, time
from pathlib import Path
from runtime.guard import publish, manifest, claim

place, log, pause, stop_at = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]

def point(name):
    if name == stop_at:
        print("AT", name, flush=True)
        while not (place.parent / "go").exists():
            time.sleep(0.05)

def before(owner, name, function):
    original = getattr(owner, name)
    def stopping(*args, **kwargs):
        point(function)
        return original(*args, **kwargs)
    setattr(owner, name, stopping)

if stop_at == "before owner.json":
    before(claim, "this_process", stop_at)
before(publish, "_publish", "before rename")
before(claim.Claim, "release", "before release")
rename = Path.rename
def stopping_rename(self, target):
    if target == place:
        point("at rename")
    return rename(self, target)
Path.rename = stopping_rename

def build(staging):
    with log.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    (staging / "deep").mkdir()
    (staging / "deep" / "one").write_bytes(b"1" * 100_000)
    point("in build")
    time.sleep(pause)
    (staging / "two").write_bytes(b"2" * 100_000)

publish.ensure(place, {"kind": "test", "number": 1}, build)
print("DONE", manifest.flaw(place, {"kind": "test", "number": 1}, thorough=True), flush=True)
"""


class Racer:
    """One process that asks for the directory."""

    def __init__(self, place: Path, *, pause: float = 0.0, stop_at: str = "", **environment: str) -> None:
        log = place.parent / "builds.log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(place), str(log), str(pause), stop_at],
            env={**os.environ, "PYTHONPATH": str(ROOT), "FTGEN_STALE_S": "2", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.printed = ""

    def reach(self, line: str) -> "Racer":
        """Read its output up to a line that begins so."""
        assert self.process.stdout is not None
        for printed in self.process.stdout:
            self.printed += printed
            if printed.startswith(line):
                return self
        raise AssertionError(f"it ended without {line!r}: {self.printed}")

    def finish(self) -> str:
        """Wait for its end, and expect it to have the directory, whole."""
        self.printed += self.process.communicate(timeout=30)[0]
        assert self.process.returncode == 0, self.printed
        assert "DONE None" in self.printed
        return self.printed

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "place"


@pytest.fixture
def racer(place: Path) -> Iterator[Callable[..., Racer]]:
    started: list[Racer] = []

    def start(**settings: object) -> Racer:
        started.append(Racer(place, **settings))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.kill()
        assert one.process.stdout is not None
        one.process.stdout.close()


def builds(place: Path) -> int:
    return len((place.parent / "builds.log").read_text().splitlines())


def is_clean(place: Path) -> bool:
    """Nothing beside the directory but its claims and the test's log."""
    return {path.name for path in place.parent.iterdir()} - {"builds.log", "go"} == {place.name, f".{place.name}.claims"}


def build(staging: Path) -> None:
    (staging / "small").write_text("small")
    (staging / "large").write_bytes(b"x" * (manifest.SMALL + 1))


def test_of_sixteen_that_start_together_one_builds_and_all_use_it(place: Path, racer: Callable[..., Racer]) -> None:
    racers = [racer(pause=2.0) for _ in range(16)]
    waited = sum("waiting for" in one.finish() for one in racers)
    assert builds(place) == 1
    assert waited > 0
    assert is_clean(place)


@pytest.mark.parametrize("point", ["before owner.json", "in build", "before rename", "before release"])
def test_after_a_sigkill_nothing_partial_is_taken_and_the_next_one_finishes(
    point: str, place: Path, racer: Callable[..., Racer]
) -> None:
    racer(stop_at=point).reach(f"AT {point}").kill()
    published = point == "before release"
    assert (manifest.flaw(place, SOURCE) is None) == published
    assert place.exists() == published
    racer().finish()
    assert builds(place) == {"before owner.json": 1, "in build": 2, "before rename": 2, "before release": 1}[point]
    assert is_clean(place)


@pytest.mark.parametrize("reaped", [True, False])  # a dead process lingers until its parent asks for its status
def test_a_dead_owner_on_this_machine_is_replaced_at_once(reaped: bool, place: Path, racer: Callable[..., Racer]) -> None:
    owner = racer(stop_at="in build").reach("AT")
    owner.process.kill()
    if reaped:
        owner.process.wait()
    begin = time.monotonic()
    racer(FTGEN_STALE_S="15").finish()
    assert time.monotonic() - begin < 10


def test_a_dead_owner_on_another_machine_is_replaced_when_its_heart_stands_still(
    place: Path, racer: Callable[..., Racer]
) -> None:
    racer(stop_at="in build", FTGEN_HOST="elsewhere").reach("AT").kill()
    begin = time.monotonic()
    assert "on elsewhere" in racer().finish()
    assert time.monotonic() - begin > 2
    assert builds(place) == 2


def test_a_living_owner_on_another_machine_is_waited_for(place: Path, racer: Callable[..., Racer]) -> None:
    owner = racer(pause=5, FTGEN_HOST="elsewhere")
    while not (place.parent / "builds.log").exists():
        time.sleep(0.05)
    racer().finish()
    owner.finish()
    assert builds(place) == 1


@pytest.mark.parametrize("point", ["in build", "before rename", "at rename"])
def test_an_owner_that_slept_through_a_takeover_takes_the_others_result(
    point: str, place: Path, racer: Callable[..., Racer]
) -> None:
    sleeper = racer(stop_at=point)
    sleeper.reach(f"AT {point}")
    sleeper.process.send_signal(signal.SIGSTOP)
    racer().finish()
    published = (place / manifest.NAME).stat().st_ino
    (place.parent / "go").touch()
    sleeper.process.send_signal(signal.SIGCONT)
    assert "took over" in sleeper.finish()
    assert (place / manifest.NAME).stat().st_ino == published
    assert builds(place) == 2
    assert is_clean(place)


def test_an_owner_that_wakes_while_another_builds_waits_for_it(place: Path, racer: Callable[..., Racer]) -> None:
    sleeper = racer(stop_at="in build").reach("AT")
    sleeper.process.send_signal(signal.SIGSTOP)
    other = racer(pause=3)
    while builds(place) < 2:
        time.sleep(0.05)
    (place.parent / "go").touch()
    sleeper.process.send_signal(signal.SIGCONT)
    assert "took over" in sleeper.finish()
    other.finish()
    assert builds(place) == 2
    assert is_clean(place)


def test_sigterm_releases_the_claim_and_leaves_nothing(place: Path, racer: Callable[..., Racer]) -> None:
    owner = racer(stop_at="in build").reach("AT")
    owner.process.terminate()
    assert owner.process.wait(timeout=10) == 143
    assert sorted(path.name for path in place.parent.iterdir()) == [".place.claims", "builds.log"]
    assert (place.parent / ".place.claims" / "1" / "released").exists()


def test_sigterm_ends_a_long_call_of_an_owner_that_is_just_waking_up(place: Path, racer: Callable[..., Racer]) -> None:
    owner = racer(pause=30)
    while not (place.parent / "builds.log").exists():
        time.sleep(0.05)
    owner.process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    owner.process.send_signal(signal.SIGCONT)
    owner.process.terminate()
    assert owner.process.wait(timeout=10) == 143


def test_a_failed_build_releases_the_claim_and_raises_what_it_raised(place: Path) -> None:
    def fails(staging: Path) -> None:
        (staging / "half").write_text("half")
        raise ValueError("no such weights")

    with pytest.raises(ValueError, match="no such weights"):
        publish.ensure(place, SOURCE, fails)
    assert [path.name for path in place.parent.iterdir()] == [".place.claims"]
    begin = time.monotonic()
    publish.ensure(place, SOURCE, build)
    assert time.monotonic() - begin < 2


def test_a_published_directory_is_not_built_again(place: Path) -> None:
    publish.ensure(place, SOURCE, build)
    publish.ensure(place, SOURCE, lambda _staging: pytest.fail("it was built again"))


def test_the_manifest_says_what_was_made_of_what(place: Path) -> None:
    publish.ensure(place, SOURCE, lambda staging: [build(staging), {"commit": "abc"}][1])  # type: ignore[func-returns-value]
    document = json.loads((place / manifest.NAME).read_text())
    assert document["source"] == SOURCE
    assert document["origin"] == {"commit": "abc", "user": sharing.user_name()}
    assert document["files"]["small"]["size"] == 5
    assert sorted(document["files"]) == ["large", "small"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "large is missing": lambda place: (place / "large").unlink(),
    "large has 5 bytes": lambda place: os.truncate(place / "large", 5),
    "small has changed since it was built": lambda place: (place / "small").write_text("SMALL"),
    "large has changed since it was built": lambda place: (
        (place / "large").write_bytes(b"y" * (manifest.SMALL + 1)),
        os.utime(place / "large", (1, 1)),
    ),
    "manifest.json cannot be read": lambda place: (place / manifest.NAME).write_text("{"),
    "it has no manifest.json": lambda place: (place / manifest.NAME).unlink(),
}


@pytest.mark.parametrize("flaw", DAMAGE)
def test_a_damaged_directory_is_moved_aside_and_made_anew(
    flaw: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish.ensure(place, SOURCE, build)
    DAMAGE[flaw](place)
    assert flaw in str(manifest.flaw(place, SOURCE))
    publish.ensure(place, SOURCE, build)
    assert manifest.flaw(place, SOURCE, thorough=True) is None
    assert flaw in capsys.readouterr().out
    assert len(list(place.parent.glob("place.untrusted-*"))) == 1


def test_a_changed_byte_in_a_large_file_that_kept_its_time_is_found_by_reading_everything(place: Path) -> None:
    publish.ensure(place, SOURCE, build)
    times = (place / "large").stat()
    with (place / "large").open("r+b") as file:
        file.write(b"y")
    os.utime(place / "large", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert manifest.flaw(place, SOURCE) is None
    assert "large has changed since it was built" in str(manifest.flaw(place, SOURCE, thorough=True))


def test_a_copy_with_other_times_is_still_good(place: Path, tmp_path: Path) -> None:
    publish.ensure(place, SOURCE, build)
    os.utime(place / "large", (1, 1))
    assert manifest.flaw(place, SOURCE) is None


def test_a_directory_made_for_another_source_is_not_used(place: Path) -> None:
    publish.ensure(place, SOURCE, build)
    assert "number = 1, not 2" in str(manifest.flaw(place, SOURCE | {"number": 2}))


def test_what_another_tool_left_is_moved_aside_and_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "weights").mkdir(parents=True)
    (place / "weights" / "half").write_text("half")
    publish.ensure(place, SOURCE, build)
    assert manifest.flaw(place, SOURCE) is None
    (aside,) = place.parent.glob("place.untrusted-*")
    assert (aside / "weights" / "half").read_text() == "half"
    assert aside.name in capsys.readouterr().out


def test_too_little_room_is_said_before_anything_is_built(place: Path) -> None:
    with pytest.raises(JobError, match=r"needs 1048576\.0 GiB in .*, but only .* GiB are free\n  hint: free some space"):
        publish.ensure(place, SOURCE, lambda _staging: pytest.fail("it was built"), need_bytes=lambda: 1 << 50)
    assert not place.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_one_line(place: Path) -> None:
    def fills(_staging: Path) -> None:
        try:
            with Path("/dev/full").open("w") as file:
                file.write("x" * 100_000)
        except OSError as error:
            raise RuntimeError("a library's own words") from error

    with pytest.raises(JobError, match="is full, or your quota"):
        publish.ensure(place, SOURCE, fills)


@pytest.mark.parametrize("parent", ["file", "/sys/kernel"])  # where even root cannot make a directory
def test_a_directory_that_cannot_be_made_is_one_line(parent: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"cannot create .*: .*\n  hint: set STAGE_PATH"):
        publish.ensure(tmp_path / parent / "folder" / "place", SOURCE, build)


def test_claim_numbers_only_grow_and_one_of_two_gets_each(tmp_path: Path) -> None:
    first, second = claim.Watch(tmp_path).claim(), claim.Watch(tmp_path).claim()
    assert first is not None
    assert second is None
    first.release()
    third = claim.Watch(tmp_path).claim()
    assert third is not None
    assert third.generation == 2
    assert third.is_current()
    assert not first.is_current()
    third.release()


def test_a_requeued_job_does_not_wait_for_its_own_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("FTGEN_HOST", "the-node-it-ran-on-before")
    assert claim.Watch(tmp_path).claim() is not None
    monkeypatch.setenv("FTGEN_HOST", "another-node")
    assert claim.Watch(tmp_path).claim() is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert claim.Watch(tmp_path).claim() is not None


def test_a_job_that_slurm_says_has_ended_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\ncase "$*" in *--jobs=8*) echo RUNNING;; *--jobs=9*) echo CANCELLED;; esac\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FTGEN_HOST", "elsewhere")
    for job, free in (("8", False), ("9", True)):
        claims = tmp_path / job
        claims.mkdir()
        monkeypatch.setenv("SLURM_JOB_ID", job)
        assert claim.Watch(claims).claim() is not None
        monkeypatch.delenv("SLURM_JOB_ID")
        monkeypatch.setenv("FTGEN_HOST", "here")
        assert (claim.Watch(claims).claim() is not None) == free
