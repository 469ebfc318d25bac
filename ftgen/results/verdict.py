"""How a run ended. In: a `Log`. Out: a status of ftgen's own, not Slurm's, and the reason for it."""

from collections.abc import Mapping
from typing import NamedTuple

from ftgen.logs.failures import Told
from ftgen.logs.find import Run
from ftgen.logs.log import Log
from ftgen.logs.read import read_beside
from ftgen.results.interval import Logged
from ftgen.results.window import count

# Failure reasons, and what stands before the quoted line. An earlier one explains those after it.
FAILURES = {
    "error": "",
    "out of memory": "out of GPU memory: ",
    "host memory": "out of host memory: ",
    "collective": "a collective operation timed out: ",
    "cancelled": "cancelled: ",
    "exception": "",
    "traceback": "an exception: ",
    "killed": "",
    "task killed": "",
    "task exit": "",
}
AFTER_TRAINING = frozenset(FAILURES) - {"exception", "traceback"}  # these count even if the run made all its steps
AGAIN = 85  # exit code of a job whose training was saved before its last step
STATUSES = ("complete", "ended-badly", "incomplete", "failed", "invalid")


class Verdict(NamedTuple):
    """How a run ended, and the reason for this status."""

    status: str  # of STATUSES
    reason: str | None


def verdict_of(run: Run, log: Log, planned: int | None, lines: Logged) -> Verdict:
    """Invalid comes before all others. Complete needs every planned step and no failure."""
    not_finite = log.survived.get("not finite") or log.at_end.get("not finite")
    left_out = log.left_out if log.has_losses else None
    if log.invalid or left_out is not None or not_finite:
        lost = f"the loss is left out at step {left_out}, as Megatron does with NaN" if left_out is not None else None
        return Verdict("invalid", log.invalid or lost or (_told(not_finite) if not_finite else None))
    if log.unread and not log.steps:
        return Verdict("incomplete", log.unread)
    there = lines.made
    failure = _failure(log.at_end, log.exit_status)
    if planned and _all_there(log, lines, planned):
        spoiled = log.exit_status or (log.exit_status is None and AFTER_TRAINING & log.at_end.keys())
        if spoiled:
            return Verdict("ended-badly", f"the run made all {planned} steps and then failed: {failure}")
        return Verdict("incomplete", log.unread) if log.unread else Verdict("complete", None)
    progress = (
        f"{there} of {count(planned, 'step')}" if planned else f"{count(there, 'step')}; the planned number is unknown"
    )
    if planned and log.steps.last >= planned:
        progress += f"; step {log.steps.last} is beyond the last planned step"
    if lines.wrong is not None:
        progress += f"; step {lines.wrong} is missing or out of order"
    if log.exit_status == AGAIN and log.history.saves:
        after = f"saved after step {log.history.saves[-1][0]}, to be run again"
        return Verdict("incomplete", "; ".join(filter(None, (after, log.unread, progress))))
    failure = failure or _failure(read_beside(run), None)
    if not failure and "exited" in log.at_end:
        progress += f"; {_told(log.at_end['exited'])}"
    status = "failed" if failure else "incomplete"
    return Verdict(status, "; ".join(filter(None, (failure, log.unread, progress))))


def _all_there(log: Log, lines: Logged, planned: int) -> bool:
    """Whether each step that should have a line has one. The last few need none if the log says that training ended."""
    if lines.wrong is not None or log.steps.last >= planned:
        return False
    after = planned - 1 - log.steps.last
    said = log.stopped_at == planned or "done" in log.at_end
    return lines.made == log.steps.last + 1 - lines.first and (after == 0 or (after < lines.every and said))


def planned_steps(log: Log) -> int | None:
    """Planned steps: from the plan, else from the line with which training stops, else from the last step line."""
    if "stopped" in log.at_end and log.stopped_at is None and not log.identity.max_steps:
        return log.steps.last + 1 or None  # training stopped after its number of epochs
    return log.identity.max_steps or log.stopped_at or log.steps.planned


def _failure(told: Mapping[str, Told], exit_status: int | None) -> str | None:
    killed, signalled = told.get("killed"), told.get("task killed")  # a task that died first is the reason for the rest
    died_first = killed and signalled and (signalled.row or 0) < (killed.row or 0)
    for kind, words in FAILURES.items():
        if kind in told and not (kind == "killed" and died_first):
            return words + _told(told[kind])
    return f"exit code {exit_status}" if exit_status else None


def _told(told: Told) -> str:
    """The line of the log, with its rank and its line number."""
    if told.file:
        return f"{told.note} ({told.file})"
    rank = None if told.rank is None else f"rank {told.rank}"
    place = ", ".join(filter(None, (rank, f"line {told.row}" if told.row else None)))
    return f"{told.note} ({place})" if place else told.note
