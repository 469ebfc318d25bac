"""Reading logs. In: a `Run`. Out: the `Log` that its newest restart left, read a block at a time.

Runs are found by their names alone (`find_runs`); so those of a whole cluster can be listed at once, and read one after
the other, or in parallel.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from ftgen.errors import LogError
from ftgen.logs import identity
from ftgen.logs.blocks import Block, LogFileError, blocks
from ftgen.logs.chunk import Chunk, barest
from ftgen.logs.failures import LONGEST_TRACEBACK, Ending, endings
from ftgen.logs.find import Run, find_runs
from ftgen.logs.log import Item, Log, scan

__all__ = ["Run", "find_runs", "read_log"]

CLOCK = re.compile(rb"-(?<=20\d\d-)\d\d-\d\d[ T]\d\d:\d\d:\d\d")  # after the year: one byte is found faster than two
CLOCK_BYTES = 4096  # looked at for it, at the beginning and the end
LAST_LINES = 19  # before the last one, that are asked for a batch size


def read_log(run: Run) -> Log:
    """What the run's log says; never fails: what could not be read is in `unread` or in `problems`."""
    log = Log(identity.from_name(run.experiment))
    first = last = None
    try:
        for block in blocks(run.log):
            items = scan(block)
            take(log, run.log, block.offset, block.offset + len(block.raw), items)
            last = block.raw if _may_tell_time(block, items) else b""
            first = last if first is None else first
    except LogFileError as error:
        log.unread = str(error)
    settle(run, log, (first or b"")[:CLOCK_BYTES], (last or b"")[-CLOCK_BYTES:])
    return log


def _may_tell_time(block: Block, items: Sequence[Item]) -> bool:
    """False for nothing but step lines that are alike: without their digits all have the colons of a time, or none."""
    alike = len(items) == 1 and isinstance(items[0], Chunk) and len(items[0].text) == len(block.raw)
    return not alike or b"::" in barest(block.raw[: block.raw.find(b"\n")])


def take(log: Log, path: str, start: int, end: int, items: Iterable[Item]) -> None:
    """What was found from `start` to `end` of the file into the log."""
    again = partial(_read_again, path, start, end)
    for item in items:
        log.take(item, again)


def _read_again(path: str, start: int, end: int, chunk: Chunk) -> Chunk:
    """The chunk with its lines; without, if they are not there any more."""
    try:
        found = [item for block in blocks(path, start, end) for item in scan(block) if isinstance(item, Chunk)]
    except LogFileError:
        return chunk
    texts = [part.text for part in found if chunk.first <= part.first and part.last <= chunk.last]
    return chunk._replace(text=b"".join(texts), alike=len(texts) == 1)


def read_batch_log(run: Run) -> dict[str, Ending]:
    """What the batch script's own log beside the run's tells of its end: NeMo-Run has srun's words there."""
    told: dict[str, Ending] = {}
    if run.batch:
        try:
            for block in blocks(run.batch):
                for ending in endings(block.text):
                    told.setdefault(ending.kind, ending._replace(file=run.batch.name))
        except LogFileError:
            pass  # the run's log is what counts
    return told


def settle(run: Run, log: Log, head: bytes, tail: bytes) -> None:
    """What follows from the whole log: what it is the log of, and when it begins and ends, where these bytes say so."""
    began, ended = CLOCK.search(head), list(CLOCK.finditer(tail))
    log.started = _datetime(head[began.start() - 4 : began.end()]) if began else None
    log.ended = _datetime(tail[ended[-1].start() - 4 : ended[-1].end()]) if ended else None
    _end_traceback(run, log)
    _identify(run, log)


def _end_traceback(run: Run, log: Log) -> None:
    """The line that ends the first traceback, where that goes over the end of a block: within one it has been found."""
    begin, end = (ending and ending.at for ending in map(log.endings.get, ("traceback", "exception")))
    if begin is None or (end is not None and end - begin <= LONGEST_TRACEBACK):
        return
    try:
        around = list(blocks(run.log, begin, begin + LONGEST_TRACEBACK))
    except LogFileError:
        return  # what is known stays
    items = scan(Block(around[0].offset, b"".join(block.raw for block in around))) if around else []
    if found := next((item for item in items if isinstance(item, Ending) and item.kind == "exception"), None):
        kinds = [kind for kind in log.endings if kind != "exception"]
        kinds.insert(kinds.index("traceback") + 1, "exception")
        log.endings = {kind: found if kind == "exception" else log.endings[kind] for kind in kinds}


def _datetime(text: bytes) -> datetime | None:
    try:
        return datetime.fromisoformat(text.decode())
    except ValueError:  # the 31st of June
        return None


def _identify(run: Run, log: Log) -> None:
    """plan.json, else the head line, else the name with what the step lines say."""
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
            log.problems.append(identity.problem_lines(error))
    log.identity = identity.from_name(run.experiment, _batch(log))


def _same(plan: bytes, head: bytes) -> bool:
    if plan.strip() == head.strip():
        return True
    try:
        return bool(json.loads(plan) == json.loads(head))
    except (ValueError, RecursionError):
        return True  # which is said elsewhere


def _batch(log: Log) -> int | None:
    """Samples a step: as most of the last step lines say, else by how many were consumed; None if that is no number."""
    last = log.steps.between(log.steps.last - LAST_LINES, log.steps.last + 1)
    batches: list[int] = list(filter(None, last.told("global_batch_size")))
    if len(batches) > 1:
        batches = list(filter(None, last.said("global_batch_size")))
    if not batches:
        sizes = ((step.consumed_samples or 0.0) / (number + 1) for number, step in last.items())
        batches = [int(size) for size in sizes if 1 <= size < 1e9 and size.is_integer()]
    return max(dict.fromkeys(batches), key=batches.count, default=None)
