"""A log that is still being written. In: its `Run`, again and again. Out: each time the `Log` that `read_log` would give.

A look reads what was added since the one before, whatever the size of the log. A file that was replaced, cut short or
written anew is read from its beginning, and so is a compressed one.
"""

from copy import copy

from ftgen.logs import identity
from ftgen.logs.blocks import Block, LogFileError, blocks, is_packed, line_end, stands_in
from ftgen.logs.feed import feed
from ftgen.logs.find import Run
from ftgen.logs.log import Log
from ftgen.logs.read import read_log, settle


class Growing:
    """The reader of one log."""

    def __init__(self) -> None:
        self._log: Log | None = None  # what whole lines say
        self._offset = 0  # where they end, in bytes
        self._file: tuple[int, int] | None = None

    def read(self, run: Run) -> Log:
        """What the log says by now. Never fails, as `read_log`."""
        log, self._log = self._log, None
        try:
            if run.earlier or is_packed(run.log):
                return read_log(run)
            file = stands_in(run.log, self._offset, log.first_bytes, log.last_bytes) if log else None
            if log is None or file is None or file != self._file:
                log, self._offset, self._file = Log(identity.from_name(run.experiment)), 0, stands_in(run.log, 0, b"", b"")
            return self._read(run, log)
        except (LogFileError, OSError):
            return read_log(run)

    def _read(self, run: Run, log: Log) -> Log:
        rest = b""
        for block in blocks(run.log, self._offset):
            end = line_end(block.raw)
            whole, rest = block.raw[:end], block.raw[end:]
            if whole:
                feed(log, Block(block.offset, whole))
                self._offset += len(whole)
            if rest and end == 0:
                break  # a line without end
        self._log = log
        now = copy(log)
        for block in blocks(run.log, self._offset) if rest else ():
            feed(now, block)
        settle(run, now)
        return now
