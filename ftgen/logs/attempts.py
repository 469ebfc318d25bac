"""Which attempt of which run a step belongs to. In: a `Log`, and the number of its next step. Out: the log, changed.

A log may hold several attempts of a run, which go on where the one before stopped or start over, and several runs, one
after the other.
"""

import copy

from ftgen.logs.log import CLEAN_ENDS, NEAR, Log
from ftgen.logs.steps import Steps

ENDS = CLEAN_ENDS | {"cancelled", "killed", "exit", "job exit", "task exit", "task killed"}


def goes_on(log: Log, number: int) -> bool:
    """Whether a step follows those before it, or those of an earlier attempt that this one resumes."""
    if log.earlier and not log.steps:
        *_, before, last = -1, -1, *log.earlier
        if 0 < number <= last + max(last - before, 1):  # a log may have a line every N steps
            log.earlier.cut(number)
            log.steps, log.resumes = log.earlier, log.resumes + 1
        log.earlier = Steps()
    return number > log.steps.last


def start_over(log: Log, number: int, before: int, batch: int | None) -> None:
    """What a step means that comes after a later one: another rank's line, an attempt, or another run.

    `before` is the last step of the same rank, `batch` the global batch size that the line tells of.
    """
    first = log.steps.first
    if number <= first and batch and batch != (log.steps[first].global_batch_size or batch):
        end_run(log)
        return
    near = 0 if ENDS & log.at_end.keys() else NEAR  # ranks print their lines a little out of order
    if number > before - near:
        return
    planned = log.stopped_at or log.steps.planned
    finished = CLEAN_ENDS & log.at_end.keys() or log.exit_status == 0 or (planned and log.steps.last + 1 >= planned)
    if finished:
        end_run(log)
        return
    log.attempts += 1
    if number > first:  # it goes on from a checkpoint
        log.steps.cut(number)
        log.last_of = {}
        log.resumes += 1
    else:
        log.begin()


def begin_plan(log: Log, plan: bytes) -> None:
    """What the line with a plan means: another attempt, or another run if the plan is another one."""
    if log.steps and log.head and log.head != plan:
        end_run(log)
    else:
        begin_attempt(log)
    log.head = plan


def begin_attempt(log: Log) -> None:
    """What comes from here on is of another attempt, which may go on where this one stopped."""
    log.attempts += bool(log.steps)
    steps = log.steps or log.earlier
    log.begin()
    log.earlier = steps


def end_run(log: Log) -> None:
    """What comes from here on is of another run."""
    done = copy.copy(log)
    done.before, done.rows = [], 0
    done.first_bytes = done.last_bytes = b""  # of a file with several runs, nobody knows whose times these are
    log.before.append(done)
    log.attempts, log.resumes, log.head, log.marks = 1, 0, b"", []
    log.begin()
