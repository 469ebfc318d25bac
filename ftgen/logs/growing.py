"""A log that is still being written. In: its `Run`, again and again. Out: each time the `Log` that `read_log` would give.

A look reads what was added since the one before, whatever the size of the log. A file that was replaced, cut short or
written anew is read from its beginning, and so is a compressed one.
"""

from copy import copy

from ftgen.logs import identity
from ftgen.logs.blocks import Block, LogFileError, Place, blocks, is_packed, line_end
from ftgen.logs.feed import feed
from ftgen.logs.find import Run
from ftgen.logs.log import Log
from ftgen.logs.read import read_log, settle


class Growing:
    """The reader of one log."""

    def __init__(self) -> None:
        self._known: tuple[Log, Place] | None = None  # whole lines only

    def read(self, run: Run) -> Log:
        """What the log says by now. Never fails, as `read_log`."""
        known, self._known = self._known, None
        try:
            if run.earlier or is_packed(run.log):
                return read_log(run)
            if known is None or not known[1].offset or not known[1].is_in(run.log):
                known = Log(identity.from_name(run.experiment)), Place()
            return self._read(run, *known)
        except (LogFileError, OSError):
            return read_log(run)

    def _read(self, run: Run, log: Log, place: Place) -> Log:
        rest = b""
        for block in blocks(run.log, place.offset):
            end = line_end(block.raw)
            whole, rest = block.raw[:end], block.raw[end:]
            if whole:
                feed(log, Block(block.offset, whole))
                place = place.after(run.log, whole)
            if rest and end == 0:
                break  # a line without end
        self._known = log, place
        now = copy(log)
        for block in blocks(run.log, place.offset) if rest else ():
            feed(now, block)
        settle(run, now)
        return now
