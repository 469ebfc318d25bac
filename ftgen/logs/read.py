"""Reading a log. In: a `Run`. Out: the `Log` of its newest restart, read a block at a time."""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from ftgen.errors import LogError
from ftgen.logs import failures, identity
from ftgen.logs.attempts import begin_attempt, keep_earlier_steps
from ftgen.logs.blocks import LogFileError, blocks
from ftgen.logs.failures import Told
from ftgen.logs.feed import feed
from ftgen.logs.find import Run
from ftgen.logs.log import Log
from ftgen.logs.step import Step

CLOCK = re.compile(rb"-(?<=20\d\d-)\d\d-\d\d[ T]\d\d:\d\d:\d\d")  # the year stands before it: one byte is found faster
LAST_LINES = 19  # before the last one, that are asked for a batch size


def read_log(run: Run) -> Log:
    """What the run's log says; other runs in the same file are in its `before`.

    Never fails: what could not be read is in `unread` or in `problems`. A restart that goes on where the one before stopped
    is read together with that one, and so are all attempts of a run that is saved.
    """
    log = _read(run, [run.log])
    first = next(iter(log.steps), 0)
    saved = bool(log.history.attempts)  # by ftgen's own job: all attempts are one run, also those that made no step
    if run.earlier and (first > 0 or saved) and not log.before:
        joined = _read(run, [*run.earlier, run.log])
        if saved:
            keep_earlier_steps(joined)
        if joined.resumes or saved:
            settle(run, joined)
            return joined
    log.earlier_logs = len(run.earlier)
    settle(run, log)
    return log


def _read(run: Run, paths: Iterable[str]) -> Log:
    log = Log(identity.from_name(run.experiment))
    for number, path in enumerate(paths):
        if number:
            begin_attempt(log)
            log.rows = 0
        try:
            for block in blocks(path):
                feed(log, block)
        except LogFileError as error:
            log.unread = str(error)
    return log


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
            for block in blocks(path):
                for each in failures.find(block.text):
                    told.setdefault(each.kind, each._replace(file=path.name))
        except LogFileError:
            pass  # the run's log is what counts
    return told


def settle(run: Run, log: Log) -> None:
    """What follows from the whole log: what it is the log of, and when it begins and ends."""
    if log.before:
        log.first_bytes = log.last_bytes = b""
    began, ended = CLOCK.search(log.first_bytes), list(CLOCK.finditer(log.last_bytes))
    log.started = _datetime(log.first_bytes[began.start() - 4 : began.end()]) if began else None
    log.ended = _datetime(log.last_bytes[ended[-1].start() - 4 : ended[-1].end()]) if ended else None
    _identify(run, log)


def _datetime(text: bytes) -> datetime | None:
    try:
        return datetime.fromisoformat(text.decode())
    except ValueError:  # the 31st of June
        return None


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
