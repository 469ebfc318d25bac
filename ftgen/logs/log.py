"""What one log says. In: what `feed` finds in the log's blocks. Out: a `Log`: its steps, and how the run ended."""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from ftgen.logs.failures import EVERY, Told
from ftgen.logs.identity import Identity
from ftgen.logs.marks import History, Mark
from ftgen.logs.step import StepTime
from ftgen.logs.steps import Steps

CLEAN_ENDS = frozenset({"stopped", "done", "exited"})
# What a run may survive.
HANDLED = frozenset({"not finite", "out of memory", "cancelled", "killed", "traceback", "exception"})
NEAR = 3  # step lines: other ranks still print as many after the line that says why a run fails


@dataclass(eq=False, kw_only=True)
class Attempt:
    """What one attempt of a run says."""

    steps: Steps = field(default_factory=Steps)
    invalid: str | None = None  # the first reason why nothing was learned
    damaged: int = 0  # step lines that could not be read
    accumulated: int = 0  # bars beyond the first of a step, which gradient accumulation makes
    plan: dict[str, Any] | None = None  # all of it, as plan.json or the head line has it
    environment: dict[str, Any] | None = None  # what the job found: versions, GPU, driver, nodes
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)  # what the check of each node found, by the node's name
    step_times: list[StepTime] = field(default_factory=list)  # Megatron-Bridge's, which do not name their steps
    peak_memory: float | None = None  # bytes, from a line of its own
    said: dict[str, str] = field(default_factory=dict)  # what the framework prints of its settings before the steps
    has_losses: bool = False
    left_out: int | None = None  # the first step whose line has no loss
    skipped: list[int] = field(default_factory=list)  # steps that fp16 skipped
    widths: Counter[int] = field(default_factory=Counter)  # of the lines before step lines that could not be read

    # What is needed to read on
    told: dict[str, Told] = field(default_factory=dict, repr=False)  # the first line near the end of a kind, or the last
    handled: dict[str, Told] = field(default_factory=dict, repr=False)  # the first line of a kind that steps came after
    earlier: Steps = field(default_factory=Steps, repr=False)  # another attempt's, until it is known if this one goes on
    last_of: dict[int | None, int] = field(default_factory=dict, repr=False)  # the last step that each rank printed
    step_lines: int = field(default=0, repr=False)
    width: int = field(default=0, repr=False)  # of the last line, in bytes
    traceback: int = field(default=0, repr=False)  # bytes in which the exception of a traceback may still come


@dataclass(eq=False, repr=False)
class Log(Attempt):
    """What one log says: the last attempt of the last run in it, and the runs before it."""

    identity: Identity
    problems: list[str] = field(default_factory=list)  # why less is known than should be
    unread: str | None = None  # why the file is not known to its end
    attempts: int = 1  # in this file, or in those that are read together
    earlier_logs: int = 0  # logs of earlier restarts, which do not count
    resumes: int = 0  # attempts that went on where the one before had stopped
    marks: list[Mark] = field(default_factory=list)  # of all attempts
    history: History = field(default_factory=History, repr=False)  # what the marks tell
    before: "list[Log]" = field(default_factory=list)  # other runs, which ended in this file before this one began
    first_bytes: bytes = b""
    last_bytes: bytes = b""
    started: datetime | None = None  # the first and the last time in the log
    ended: datetime | None = None
    rows: int = 0  # rows of the file that have been read
    head: bytes = b""  # the plan's JSON
    timed: bool = field(default=False, repr=False)  # whether a step line had the word for its time

    def begin(self) -> None:
        """Forget what an earlier attempt said."""
        vars(self).update(vars(Attempt()))

    def __repr__(self) -> str:
        known = {each.name: getattr(self, each.name) for each in fields(self) if each.repr}
        return f"Log({known | {'at_end': self.at_end, 'survived': self.survived}})"

    def __copy__(self) -> "Log":
        """A log of its own that has been read as far; one can be fed without the other."""
        other = Log(self.identity)
        vars(other).update({name: copy.copy(value) for name, value in vars(self).items()})
        return other

    @property
    def at_end(self) -> dict[str, Told]:
        """The lines that say how the run ended: no step came after them, or just a few of other ranks."""
        return {kind: told for kind, told in self.told.items() if self._is_near(told)}

    @property
    def survived(self) -> dict[str, Told]:
        """The first line of each kind that says what the run survived: more steps came after it."""
        passed = {kind: told for kind, told in self.told.items() if kind in HANDLED and not self._is_near(told)}
        return passed | self.handled

    @property
    def stopped_at(self) -> int | None:
        """The max_steps that training says it reached."""
        stopped = self.at_end.get("stopped")
        return stopped.number if stopped else None

    @property
    def exit_status(self) -> int | None:
        """The job's: ftgen's line counts before others', and the last one before earlier ones."""
        told = self.at_end.get("exit") or self.at_end.get("job exit")
        return told.number if told else None

    def other_lines(self, numbers: Iterable[int]) -> dict[int, StepTime]:
        """Megatron-Bridge's other lines of some steps: the n-th is the n-th step's, if there is one for each step."""
        if not self.step_times or len(self.step_times) != len(self.steps):
            return {}
        places = {number: place for place, number in enumerate(self.steps)}
        return {number: self.step_times[places[number]] for number in numbers}

    def tell(self, told: Told) -> None:
        """Take a line that tells something, after the steps so far."""
        told = told._replace(steps_before=self.step_lines)
        before = self.told.get(told.kind)
        if before and not self._is_near(before):
            if told.kind in HANDLED:
                self.handled.setdefault(told.kind, before)
            before = None
        if before is None or told.kind in EVERY:
            self.told[told.kind] = told

    def _is_near(self, told: Told) -> bool:
        return self.step_lines - told.steps_before <= NEAR
