"""Reading a log. In: a `Run`. Out: the `Log` of its newest restart, read a block at a time."""

import json
import re
from datetime import datetime
from pathlib import Path

from ftgen.errors import LogError
from ftgen.logs import failures, identity
from ftgen.logs.blocks import LogFileError, blocks
from ftgen.logs.failures import Told
from ftgen.logs.find import Run
from ftgen.logs.log import Log

CLOCK = re.compile(rb"-(?<=20\d\d-)\d\d-\d\d[ T]\d\d:\d\d:\d\d")  # the year stands before it: one byte is found faster
LAST_LINES = 19  # before the last one, that are asked for a batch size


def read_log(run: Run) -> Log:
    """What the run's log says. Never fails: what could not be read is in `unread` or in `problems`."""
    log = Log(identity.from_name(run.experiment))
    try:
        for block in blocks(run.log):
            log.feed(block)
    except LogFileError as error:
        log.unread = str(error)
    settle(run, log)
    return log


def read_batch_log(run: Run) -> dict[str, Told]:
    """What the batch script's own log beside the run's says of its end: NeMo-Run has srun's words there."""
    told: dict[str, Told] = {}
    if run.batch:
        try:
            for block in blocks(run.batch):
                for each in failures.find(block.text):
                    told.setdefault(each.kind, each._replace(file=run.batch.name))
        except LogFileError:
            pass  # the run's log is what counts
    return told


def settle(run: Run, log: Log) -> None:
    """What follows from the whole log: what it is the log of, and when it begins and ends."""
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
    if plan and log.head and not _same(plan, log.head):
        log.problems.append("plan.json is not the plan in the log's head line")
    for text, file in ((plan, "plan.json"), (log.head, Path(run.log).name if log.head else "")):
        try:
            if text:
                log.identity, log.plan = identity.from_plan(text, file)
                return
        except LogError as error:
            log.problems.append("; ".join(map(str, error.problems)))
    log.identity = identity.from_name(run.experiment, _batch(log))


def _same(plan: bytes, head: bytes) -> bool:
    if plan.strip() == head.strip():
        return True
    try:
        return bool(json.loads(plan) == json.loads(head))
    except (ValueError, RecursionError):
        return True  # another problem says so


def _batch(log: Log) -> int | None:
    """Samples a step: as most of the last step lines say, else by how many were consumed; None if that is no number."""
    last = log.steps.between(log.steps.last - LAST_LINES, log.steps.last + 1)
    batches = [step.global_batch_size for step in last.values() if step.global_batch_size]
    if not batches:
        sizes = ((step.consumed_samples or 0.0) / (number + 1) for number, step in last.items())
        batches = [int(size) for size in sizes if 1 <= size < 1e9 and size.is_integer()]
    return max(dict.fromkeys(batches), key=batches.count, default=None)
