"""What one log says. In: its blocks, in order. Out: a `Log`: its steps, and the lines that tell how the run ended.

`Log.feed` is the only way in, so that a log that grows says what a fresh read of it would say. A log may hold several
attempts of a run, which go on where the one before stopped or start over, and several runs, one after the other.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from copy import copy
from datetime import datetime
from itertools import groupby
from typing import Any

from ftgen.logs import failures, formats, settings
from ftgen.logs.blocks import Block
from ftgen.logs.failures import REPEATED, Told
from ftgen.logs.formats import bridge, nemo, nemo_untimed
from ftgen.logs.identity import Identity
from ftgen.logs.step import StepLine, StepTime
from ftgen.logs.steps import Steps

LABEL = re.compile(rb" *(\d{1,6}): |\[rank ?(\d{1,6})|\[default(\d{1,6})\]")
CLEAN_ENDS = frozenset({"stopped", "done", "exited"})
ENDS = CLEAN_ENDS | {"cancelled", "killed", "exit", "job exit", "task exit", "task killed"}
((HEAD,), _) = failures.KINDS["plan"]  # ftgen's own: the plan as one line of JSON
LONGEST_LINE = 1 << 16  # bytes of a step line that are looked at
EDGE = 4096  # bytes at the beginning and the end of a log in which a time is looked for
# What a run may survive.
HANDLED = frozenset({"not finite", "out of memory", "cancelled", "killed", "traceback", "exception"})
NEAR = 3  # step lines: other ranks still print as many after the line that says why a run fails


class Log:
    """What one log says."""

    def __init__(self, identity: Identity, steps: Steps | None = None) -> None:
        self.identity = identity
        self.problems: list[str] = []  # why less is known than should be
        self.unread: str | None = None  # why the file is not known to its end
        self.attempts = 1  # in this file, or in those that are read together
        self.earlier_logs = 0  # logs of earlier restarts, which do not count
        self.resumes = 0  # attempts that went on where the one before had stopped
        self.before: list[Log] = []  # other runs, which ended in this file before this one began
        self.first_bytes = self.last_bytes = b""
        self.started: datetime | None = None  # the first and the last time in the log
        self.ended: datetime | None = None
        self.rows = 0  # lines that have been read
        self.head = b""  # the plan's JSON
        self._timed = False  # whether a step line had the word for its time
        self._begin(steps or Steps())

    def _begin(self, steps: Steps) -> None:
        """Forget what an earlier attempt said."""
        self.steps = steps
        self._earlier = Steps()  # an earlier attempt's, until it is known whether this one goes on from there
        self.invalid: str | None = None  # the first reason why nothing was learned
        self.damaged = 0  # step lines that could not be read
        self.accumulated = 0  # bars beyond the first of a step, which gradient accumulation makes
        self.told: dict[str, Told] = {}  # the first line of each kind near the end; of REPEATED kinds the last
        self.handled: dict[str, Told] = {}  # the first line of each kind that steps came after
        self.plan: dict[str, Any] | None = None  # all of it, as plan.json or the head line has it
        self.environment: dict[str, Any] | None = None  # what the job found: versions, GPU, driver, nodes
        self.step_times: list[StepTime] = []  # Megatron-Bridge's, which do not name their steps
        self.peak_memory: float | None = None  # bytes, from a line of its own
        self.said: dict[str, str] = {}  # seq_length, world_size and gpu, as the framework prints them before the steps
        self.with_loss: int | None = None  # the first step with a loss, and the first whose line leaves it out
        self.without_loss: int | None = None
        self.skipped: list[int] = []  # steps that fp16 skipped
        self.widths: Counter[int] = Counter()  # of the lines before step lines that could not be read
        self._width = 0  # of the last line, in bytes
        self._last_of: dict[bytes, int] = {}  # the last step that each rank printed, by its label
        self._step_lines = 0
        self._traceback = 0  # bytes in which the exception of the last traceback may still come

    def __repr__(self) -> str:
        known = {key: value for key, value in self.__dict__.items() if key not in {"told", "handled"} and key[0] != "_"}
        return f"Log({known | {'at_end': self.at_end, 'survived': self.survived}})"

    @property
    def at_end(self) -> dict[str, Told]:
        """The lines that say how the run ended: no step came after them, or just a few of other ranks."""
        return {kind: told for kind, told in self.told.items() if self._is_near(told)}

    @property
    def survived(self) -> dict[str, Told]:
        """The first line of each kind that says what the run survived: more steps came after it."""
        passed = {k: told for k, told in self.told.items() if not self._is_near(told) and k in HANDLED}
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

    def copy(self) -> "Log":
        """A log of its own that has been read as far; one can be fed without the other."""
        other = copy(self)
        other.problems, other.step_times = [*self.problems], [*self.step_times]
        other.told, other.handled, other.said = dict(self.told), dict(self.handled), dict(self.said)
        other.before, other.skipped = [*self.before], [*self.skipped]
        other.steps, other.widths, other._last_of = self.steps.copy(), self.widths.copy(), dict(self._last_of)
        return other

    def other_lines(self, numbers: Any) -> dict[int, StepTime]:
        """Megatron-Bridge's other lines of some steps: the n-th is the n-th step's, if there is one for each step."""
        if not self.step_times or len(self.step_times) != len(self.steps):
            return {}
        places = {number: place for place, number in enumerate(self.steps)}
        return {number: self.step_times[places[number]] for number in numbers}

    def feed(self, block: Block) -> None:
        """Take the next lines."""
        if len(self.first_bytes) < EDGE:
            self.first_bytes = (self.first_bytes + block.raw)[:EDGE]
        self.last_bytes = (self.last_bytes + block.raw)[-EDGE:] if len(block.raw) < EDGE else block.raw[-EDGE:]
        self._told_at, self._told_kind = 0, ""
        self._feed(block.text, block)
        self.rows += block.rows

    def _feed(self, text: bytes, block: Block) -> None:
        """Text before the first step line, step lines with other text between them, text behind the last few of them."""
        words = formats.words_in(text)
        if words == [nemo_untimed.WORD] and self._timed:
            words = []  # a line that lost its time
        if not words:
            self._take_other(text, block)
            return
        start = text.rfind(b"\n", 0, min(map(text.find, words))) + 1
        stop = _line_after(text, max(map(text.rfind, words)))
        if b"{" in text and (head := text.find(HEAD, start, stop)) >= 0 and (head := text.rfind(b"\n", 0, head) + 1) > start:
            self._feed(text[:head], block)  # another attempt begins between these steps
            self._feed(text[head:], block)
            return
        self._take_other(text[:start], block)
        if words != [nemo_untimed.WORD] and not self._timed:
            self._forget_steps()  # of lines that lost their time, before the first one with a time
            self._timed = True
        alike = words == [nemo.WORD] and self._take_alike(text, start, stop, block)
        for is_step, lines in _grouped(text[alike or start : stop], words):
            if is_step and alike:
                self._step_lines += len(lines)
            elif is_step:
                for line in lines:
                    self._take_line(line[:LONGEST_LINE], block)
                    self._width = len(line)
            else:
                self._take_text(b"".join(lines), block)
            self._width = len(lines[-1])
        self._take_other(text[stop:], block)

    def _take_alike(self, text: bytes, start: int, stop: int, block: Block) -> int:
        """Many of NeMo's step lines at once, with whatever stands between them; 0 where they are not that plain.

        Else where the last few of them begin: only what stands between those can be near the end of the run.
        """
        count = text.count(nemo.WORD, start, stop)
        if count <= NEAR or self._traceback or text[stop - 1 : stop] != b"\n":
            return 0
        scanned = nemo.scan(text, start, stop)
        final = text[text.rfind(b"\n", start, stop - 1) + 1 : stop]
        if not scanned or len(scanned.numbers) != count or not nemo.is_plain(final):
            return 0
        last = _line_after(text, _last(text, NEAR + 1, stop))
        if count < block.rows and failures.may_tell(text, start, last):
            return 0
        if not self._goes_on(scanned.numbers[0]) or not self.steps.add_scanned(text[start:stop], scanned):
            return 0
        self._last_of[_label(text[start:])] = scanned.numbers[-1]
        self.with_loss = scanned.numbers[0] if self.with_loss is None else self.with_loss
        self._step_lines += count - NEAR
        return last

    def _take_other(self, text: bytes, block: Block) -> None:
        """Text before or behind step lines."""
        self._take_text(text, block)
        if not self.steps:
            self.said |= settings.find(text)
        if text:
            self._width = len(text) - text.rfind(b"\n", 0, len(text) - 1) - 1

    def _forget_steps(self) -> None:
        self.steps, self._last_of, self._step_lines = Steps(), {}, 0
        self.with_loss = self.without_loss = self.invalid = None
        self.skipped = []

    def _take_line(self, line: bytes, block: Block) -> None:
        """One step line. What another process printed into it counts as well."""
        self._expect(line)
        read = formats.parse(line)
        if isinstance(read, StepTime):
            self.step_times.append(read)
        elif isinstance(read, StepLine):
            self._take_step(read, line)
        else:
            self.damaged += 1
            self.widths[self._width] += 1
            self._take_text(line[failures.start(line) :], block)

    def _take_step(self, read: StepLine, line: bytes) -> None:
        label = _label(line)
        number = self._next(read) if read.number is None else read.number
        if not self._goes_on(number):
            self._start_over(number, self._last_of.get(label, -1), read.step.global_batch_size)
        self._last_of[label] = max(number, self._last_of.get(label, number))
        if read.invalid and not self.invalid:
            self.invalid = f"{read.invalid} at step {number}"
        if read.skipped:
            self.skipped.append(number)
        if read.step.loss is not None and self.with_loss is None:
            self.with_loss = number
        if read.left_out and self.without_loss is None:
            self.without_loss = number
        self.accumulated += self.steps.add(read, number)
        self._step_lines += 1

    def _goes_on(self, number: int) -> bool:
        """Whether a step follows those before it, or those of an earlier attempt that this one resumes."""
        if self._earlier and not self.steps:
            *_, before, last = -1, -1, *self._earlier
            if 0 < number <= last + max(last - before, 1):  # a log may have a line every N steps
                self._earlier.cut(number)
                self.steps, self.resumes = self._earlier, self.resumes + 1
            self._earlier = Steps()
        return number > self.steps.last

    def _start_over(self, number: int, before: int, batch: int | None) -> None:
        """What a step means that comes after a later one: another rank's line, an attempt, or another run."""
        first = next(iter(self.steps), -1)
        if number <= first and batch and batch != (self.steps[first].global_batch_size or batch):
            self.end_run()
            return
        near = 0 if ENDS & self.at_end.keys() else NEAR  # ranks print their lines a little out of order
        if number > before - near:  # `before` is the last step of the same rank
            return
        planned = self.stopped_at or self.steps.planned
        finished = CLEAN_ENDS & self.at_end.keys() or self.exit_status == 0 or (planned and self.steps.last + 1 >= planned)
        if number > first and not finished:  # it goes on from a checkpoint
            self.steps.cut(number)
            self._last_of = {}
            self.attempts += 1
            self.resumes += 1
            return
        if finished:
            self.end_run()
        else:
            self.attempts += 1
            self._begin(Steps())

    def end_run(self) -> None:
        """What comes from here on is of another run."""
        done = self.copy()
        done.before, done.rows = [], 0
        done.first_bytes = done.last_bytes = b""  # of a file with several runs, nobody knows whose times these are
        self.before.append(done)
        self.attempts, self.resumes, self.head = 1, 0, b""
        self._begin(Steps())

    def begin_attempt(self) -> None:
        """What comes from here on is of another attempt, which may go on where this one stopped."""
        self.attempts += bool(self.steps)
        steps = self.steps if self.steps else self._earlier
        self._begin(Steps())
        self._earlier = steps

    def _next(self, line: StepLine) -> int:
        """The number of a step whose line does not say it: one more than the last if samples were consumed since."""
        last = self.steps.last
        return 0 if last < 0 else last + (line.step.consumed_samples != self.steps[last].consumed_samples)

    def _take_text(self, text: bytes, block: Block) -> None:
        """Text without step lines."""
        if self._traceback and (told := failures.exception(text, 0, self._traceback)):
            self._take(told, block)
        self._expect(text)
        if bridge.MEMORY in text:
            self.peak_memory = max(filter(None, (self.peak_memory, bridge.peak_memory(text))), default=None)
        for told in failures.find(text):
            self._take(told, block)
            if told.kind == "traceback":
                self._traceback = failures.LONGEST_TRACEBACK - (len(text) - text.find(told.line) - len(told.line))

    def _expect(self, text: bytes) -> None:
        """An exception is expected in fewer bytes than before."""
        self._traceback = max(0, self._traceback - len(text))

    def _take(self, told: Told, block: Block) -> None:
        """A line that tells something."""
        kind = told.kind
        if kind == "plan":
            if self.steps and self.head and self.head != told.json:
                self.end_run()
            else:
                self.begin_attempt()
            self.head = told.json
        elif kind == "environment":
            self.environment = _json(told.json)
        elif kind == "exception":
            self._traceback = 0
        at = block.raw.find(told.line, self._told_at + (kind == self._told_kind))
        self._told_at, self._told_kind = max(at, self._told_at), kind
        row = self.rows + block.raw.count(b"\n", 0, self._told_at) + 1
        told = told._replace(row=row, steps_before=self._step_lines)
        before = self.told.get(kind)
        if before and not self._is_near(before):
            if kind in HANDLED:
                self.handled.setdefault(kind, before)
            before = None
        if before is None or kind in REPEATED:
            self.told[kind] = told

    def _is_near(self, told: Told) -> bool:
        return self._step_lines - told.steps_before <= NEAR


def _label(line: bytes) -> bytes:
    """What a line begins with that tells its rank; nothing where it has no label."""
    found = LABEL.match(line)
    return found.group() if found else b""


def _line_after(text: bytes, at: int) -> int:
    """Where the line ends that `at` is in."""
    return text.find(b"\n", at) + 1 or len(text)


def _last(text: bytes, count: int, stop: int) -> int:
    """Where the last but `count` - 1 of NeMo's step lines has its word."""
    for _ in range(count):
        stop = text.rfind(nemo.WORD, 0, stop)
    return stop


def _grouped(text: bytes, words: list[bytes]) -> Iterator[tuple[bool, list[bytes]]]:
    """Lines that follow each other and are step lines, or are none."""
    lines = groupby(text.splitlines(keepends=True), lambda line: any(word in line for word in words))
    return ((is_step, list(lines)) for is_step, lines in lines)


def _json(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
