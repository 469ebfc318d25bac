"""Follow runs while they run. In: LOGS. Out: a `Progress` for each run.

A look reads only what was added to a log since the last look. The figures are those that `tabulate` gives for the whole log.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ftgen.errors import LogError
from ftgen.logs.find import Run, find_runs
from ftgen.logs.log import CLEAN_ENDS, Log
from ftgen.logs.read import Growing, logs_of
from ftgen.results.summary import Summary, judge

LAST_STEPS = 10  # their median is the step time that gives the time left
SILENT_S = 600  # after so long without a new line, a run is shown as silent
GONE_S = 60  # after so long without a new line, a job that is not in the queue is over
QUEUE_S = 10  # between two calls of squeue
SHARE = 0.2  # of the time may be spent on reading
BAD = {"failed", "invalid", "ended-badly"}


class Progress(NamedTuple):
    """How far a run is."""

    run: Summary
    state: str  # running, silent since, or the state of the queue or of the verdict
    over: bool
    step: int  # how far the run is: the number of the last step, from 1
    step_time_s: float | None  # of the last steps
    loss: float | None  # of the last step that has one
    eta_s: float | None  # time left until the last step

    @property
    def name(self) -> str:
        """The experiment and its id."""
        return f"{self.run.experiment} {self.run.run_id}".strip()

    @property
    def sample(self) -> tuple[object, ...]:
        """The values whose change is worth a new line."""
        return (self.state, self.run.status if self.over else None, self.step, self.loss)


@dataclass
class Look:
    """A log as it was at the last look."""

    reader: Growing
    stamp: tuple[int, ...] | None = None  # modification time, size, inode, device
    found: tuple[tuple[Summary, Log], ...] = ()  # of each run in it, in order


class Follower:
    """Looks at LOGS repeatedly. `queue` gives the state of each job id, or None; `clock` is the files' time in seconds."""

    def __init__(
        self,
        paths: Iterable[Path],
        queue: Callable[[], Mapping[str, str] | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.paths = list(paths)
        self.queue, self.clock = queue, clock
        self.jobs: Mapping[str, str] | None = None
        self.asked = float("-inf")
        self.read: dict[str, Look] = {}

    def look(self) -> list[Progress]:
        """The progress of every run so far. LogError for a path that does not exist."""
        if self.clock() - self.asked >= QUEUE_S:
            self.jobs, self.asked = self.queue(), self.clock()
        runs = self._runs()
        self.read = {run.log: self.read.get(run.log) or Look(Growing()) for run in runs}
        return [progress for run in runs for progress in self._progress(run, self.read[run.log])]

    def _runs(self) -> list[Run]:
        try:
            return find_runs(self.paths)
        except LogError:
            if not all(path.exists() for path in self.paths):
                raise
            return []  # no job has started yet

    def _progress(self, run: Run, look: "Look") -> Iterator[Progress]:
        """The progress of each run in a log: all but the last one are over."""
        try:
            status = Path(run.log).stat()
        except OSError:  # removed since it was found
            status = None
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev) if status else None
        if not look.found or look.stamp != stamp:
            each = logs_of(run, look.reader.read(run))
            look.stamp, look.found = stamp, tuple((judge(one._replace(telemetry=()), log), log) for one, log in each)
        written_s = status.st_mtime if status else 0.0
        silent_s = self.clock() - written_s
        queued = (self.jobs or {}).get(run.run_id)
        gone = self.jobs is not None and queued is None and silent_s > GONE_S
        quiet = f"silent since {datetime.fromtimestamp(written_s).astimezone():%H:%M}" if silent_s > SILENT_S else None
        yield from (progress(*found, None, queued=False, gone=True) for found in look.found[:-1])
        yield progress(*look.found[-1], queued or quiet, queued=queued is not None, gone=gone)


def progress(run: Summary, log: Log, state: str | None, *, queued: bool, gone: bool) -> Progress:
    """How far a run is. `state` is its state in the queue, if known; `gone` means that its job no longer exists."""
    last = [step for _, step in sorted(log.steps.between(log.steps.last - LAST_STEPS + 1, log.steps.last + 1).items())]
    times = [step.time_s for step in last if step.time_s is not None]
    step_time_s = median(times) if times else None
    ended = log.exit_status is not None or bool(CLEAN_ENDS & log.at_end.keys())
    over = not queued and (gone or ended or run.status in BAD or run.status == "complete")
    left = max(0, run.planned_steps - 1 - log.steps.last) if run.planned_steps else None
    return Progress(
        run=run,
        state=run.status if over or run.status in BAD else state or "running",
        over=over,
        step=max(run.steps, log.steps.last + 1),
        step_time_s=step_time_s,
        loss=next((step.loss for step in reversed(last) if step.loss is not None), None),
        eta_s=None if over or left is None or step_time_s is None else left * step_time_s,
    )
