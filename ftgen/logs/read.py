"""Reading a log. In: a `Run`. Out: the `Log` of its newest restart, read a block at a time.

`read_log` reads a log once; a `Growing` reads one that is still being written, again and again.
"""

import re
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path

from ftgen.errors import LogError
from ftgen.logs import failures, identity
from ftgen.logs.attempts import begin_attempt
from ftgen.logs.blocks import LogFileError, blocks, line_end, shown, stands_in
from ftgen.logs.failures import Told
from ftgen.logs.feed import feed
from ftgen.logs.find import Run
from ftgen.logs.log import Log
from ftgen.logs.marks import History, moment
from ftgen.logs.step import Step

CLOCK = re.compile(rb"20\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d")
LAST_LINES = 19  # before the last one, that are asked for a batch size


def read_log(run: Run) -> Log:
    """What the run's log says; other runs in the same file are in its `before`.

    Never fails: what could not be read is in `unread` or in `problems`. A restart that goes on where the one before stopped
    is read together with that one, and so are all attempts of a run that is saved.
    """
    log = _read(run, [run.log])
    saved = bool(History(log.marks).attempts)  # by ftgen's own job: all attempts are one run, also those that made no step
    if run.earlier and (saved or log.steps.first > 0) and not log.before:
        joined = _read(run, [*run.earlier, run.log])
        if saved:
            joined.steps = joined.steps or joined.earlier  # where the last attempt made none
        if joined.resumes or saved:
            return settle(run, joined)
    log.earlier_logs = len(run.earlier)
    return settle(run, log)


def _read(run: Run, paths: Iterable[str]) -> Log:
    log = Log(identity.from_name(run.experiment))
    for number, path in enumerate(paths):
        if number:
            begin_attempt(log)
            log.rows = 0
        try:
            for raw in blocks(path):
                feed(log, raw)
        except LogFileError as error:
            log.unread = str(error)
    return log


class Growing:
    """Reads one log again and again. A look reads what was added since the one before, whatever the size of the log.

    A file that was replaced, cut short or written anew is read from its beginning, and so is a compressed one.
    """

    def __init__(self) -> None:
        self._log: Log | None = None  # what whole lines say
        self._offset = 0  # where they end, in bytes
        self._file: tuple[int, int] | None = None

    def read(self, run: Run) -> Log:
        """What the log says by now, as `read_log` would tell it. Never fails."""
        log, self._log = self._log, None
        try:
            if run.earlier:
                return read_log(run)
            file = stands_in(run.log, self._offset, log.first_bytes, log.last_bytes) if log else None
            if log is None or file is None or file != self._file:
                log, self._offset, self._file = Log(identity.from_name(run.experiment)), 0, stands_in(run.log, 0, b"", b"")
            return settle(run, self._read_on(run, log))
        except (LogFileError, OSError):
            return read_log(run)

    def _read_on(self, run: Run, log: Log) -> Log:
        """Take whole lines; they and the line that has no end yet are what the log says by now."""
        now = None
        for raw in blocks(run.log, self._offset):
            end = 0 if now else line_end(raw)
            if end:
                feed(log, raw[:end])
                self._offset += end
            if raw[end:]:
                now = now or copy(log)
                feed(now, raw[end:])
        self._log = log
        return now or copy(log)


def logs_of(run: Run, log: Log) -> list[tuple[Run, Log]]:
    """Each run in the file of a log, in order; a number behind the id tells them apart."""
    if not log.before:
        return [(run, log)]
    together = [*log.before, log]
    for each in log.before:
        settle(run, each)
    return [(run._replace(run_id=f"{run.run_id}#{number}"), each) for number, each in enumerate(together, 1)]


def read_beside(run: Run) -> dict[str, Told]:
    """What the files beside the run's log say of its end: NeMo-Run has srun's words in the batch script's log."""
    told: dict[str, Told] = {}
    for path in run.beside:
        try:
            for raw in blocks(path):
                for each in failures.find(shown(raw)):
                    told.setdefault(each.kind, each._replace(file=path.name))
        except LogFileError:
            pass  # the run's log is what counts
    return told


def settle(run: Run, log: Log) -> Log:
    """The log, with what follows from all of it: what it is the log of, its attempts, and when it begins and ends."""
    if log.before:
        log.first_bytes = log.last_bytes = b""
    began, ended = CLOCK.findall(log.first_bytes), CLOCK.findall(log.last_bytes)
    log.started, log.ended = moment(began[0]) if began else None, moment(ended[-1]) if ended else None
    log.history = History(log.marks)
    _identify(run, log)
    return log


def _identify(run: Run, log: Log) -> None:
    """By plan.json; else by the head line; else by the name, with what the step lines say."""
    plan = None
    try:
        plan = run.plan.read_bytes() if run.plan else None
    except OSError as error:
        log.problems.append(f"plan.json: cannot be read: {error.strerror}")
    beside, printed = (identity.document(text) if text else None for text in (plan, log.head))
    if beside and printed and beside != printed:
        log.problems.append("plan.json is not the plan in the log's head line")
    for text, file in ((plan, "plan.json"), (log.head, Path(run.log).name if log.head else "")):
        try:
            if text:
                log.identity, log.plan = identity.from_plan(text, file)
                return
        except LogError as error:
            log.problems.append("; ".join(map(str, error.problems)))
    log.identity = identity.from_log(run.experiment, _batch(log), log.said)


def _batch(log: Log) -> int | None:
    """Samples a step: as most of the last step lines say, else by how many were consumed; None if that is no number."""
    return _batch_of(log.steps.between(log.steps.last - LAST_LINES, log.steps.last + 1)) or _batch_of(
        log.steps.between(0, LAST_LINES)  # the last lines of a progress bar are rounded
    )


def _batch_of(steps: Mapping[int, Step]) -> int | None:
    batches = [step.global_batch_size for step in steps.values() if step.global_batch_size]
    if not batches:
        sizes = ((step.consumed_samples or 0.0) / (number + 1) for number, step in steps.items())
        batches = [int(size) for size in sizes if 1 <= size < 1e9 and size.is_integer()]
    return max(dict.fromkeys(batches), key=batches.count, default=None)
