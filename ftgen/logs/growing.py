"""A log that is still being written. In: its `Run`, again and again. Out: each time the `Log` that `read_log` would give.

What was read stays read: a look reads what has been added, and at most one block (`log_file.BLOCK`) before it, whatever the
log's size. A file that was replaced, cut short or written anew is read from its beginning, and so is a compressed one.
"""

from typing import NamedTuple

from ftgen.logs import identity
from ftgen.logs.blocks import Block, LogFileError, Place, added, is_packed
from ftgen.logs.failures import Ending
from ftgen.logs.find import Run
from ftgen.logs.log import Item, Log, scan
from ftgen.logs.read import CLOCK_BYTES, read_log, settle, take


class Known(NamedTuple):
    """What is known of a log up to a place; what stands behind it may still change."""

    log: Log
    place: Place
    lines: int = 0  # before the place


class Growing:
    """The reader of one log."""

    def __init__(self) -> None:
        self.known: Known | None = None

    def read(self, run: Run) -> Log:
        """What the log says by now; never fails, as `read_log`."""
        known, self.known = self.known, None
        try:
            if is_packed(run.log):
                return read_log(run)
            if known is None or not known.place.read or not known.place.is_in(run.log):
                known = Known(Log(identity.from_name(run.experiment)), Place())
            return self._read(run, known)
        except (LogFileError, OSError):
            return read_log(run)

    def _read(self, run: Run, known: Known) -> Log:
        log, lines = None, known.lines
        first, last = known.place.first, known.place.last
        for block, place in added(run.log, known.place):
            if place is None and log is None:
                log = known.log.copy()
            take(log or known.log, run.log, block.offset, block.offset + len(block.raw), _items(block, lines))
            lines += block.raw.count(b"\n")
            first, last = first or block.raw[:CLOCK_BYTES], block.raw[-CLOCK_BYTES:]
            if place is not None:
                known = Known(known.log, place, lines)
        self.known = known
        log = log or known.log.copy()
        settle(run, log, first, last)
        return log


def _items(block: Block, lines: int) -> list[Item]:
    """What is in a block, behind so many lines: endings know the number of theirs, so that nobody has to count again."""
    return [_numbered(item, block, lines) if isinstance(item, Ending) else item for item in scan(block)]


def _numbered(ending: Ending, block: Block, lines: int) -> Ending:
    before = (ending.at or 0) - block.offset
    return ending._replace(row=lines + block.raw.count(b"\n", 0, before) + 1)
