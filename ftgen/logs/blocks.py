"""The bytes of a log. In: the path of a file, plain or compressed by gzip or zstd. Out: blocks of whole lines.

Offsets count decompressed bytes. What a terminal would not show is removed: colours, and the carriage returns of bars.
"""

import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

BLOCK = 1 << 20  # bytes
PACKED_BLOCK = 1 << 16  # bytes of compressed data
LONGEST_LINE = 1 << 24  # bytes: a longer line is cut
PACKED = (GZIP, ZSTD) = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # the first bytes: RFC 1952, RFC 8878
DOCKER = re.compile(rb'(?m)^\{"log":"(.*?)(?:\\[rn])*","(?:stream|time|attrs)":.*\}\n')  # its json-file driver
ESCAPE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\))")  # ECMA-48: CSI, OSC


class LogFileError(Exception):
    """Why a log cannot be read to its end. What comes before has been read."""


@dataclass
class Block:
    """Some lines of a log."""

    offset: int
    raw: bytes
    _found: tuple[int, str] = (0, "")  # the place of the last line that was asked for, and its kind

    @cached_property
    def rows(self) -> int:
        """How many lines end in the block."""
        return len(self.raw) - len(self.raw.replace(b"\n", b""))  # a third of the time that count(b"\n") takes

    def row_of(self, kind: str, line: bytes) -> int:
        """The row, from 1, of a line in the text, or of a part of one. Lines are asked for in their order."""
        before, last_kind = self._found
        at = max(before, self.raw.find(line, before + (kind == last_kind)))
        self._found = at, kind
        return self.raw.count(b"\n", 0, at) + 1

    @property
    def text(self) -> bytes:
        """The lines as a terminal shows them, each ended by one newline."""
        text = self.raw
        if b"\x1b" in text:
            text = ESCAPE.sub(b"", text)
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if text.startswith(b'{"log":"'):
            text = DOCKER.sub(lambda match: match[1].replace(b'\\"', b'"') + b"\n", text)
        return text


def stands_in(path: str | Path, offset: int, first: bytes, last: bytes) -> tuple[int, int] | None:
    """Device and inode of the file, if it begins with `first` and has `last` before the offset; LogFileError."""
    with closing(_open(path)) as file:
        status = os.fstat(file.fileno())
        there = file.read(len(first))
        file.seek(offset - len(last))
        return (status.st_dev, status.st_ino) if (there, file.read(len(last))) == (first, last) else None


def is_packed(path: str | Path) -> bool:
    """Whether the file is compressed, by its first bytes; LogFileError if it cannot be read."""
    with closing(_open(path)) as file:
        return file.read(4).startswith(PACKED)


def blocks(path: str | Path, start: int = 0) -> Iterator[Block]:
    """The lines from the one that begins at `start`, in blocks; LogFileError behind what could be read.

    A block ends where a line does, unless that line is very long or has no end.
    """
    offset, rest = start, b""
    try:
        for piece in _pieces(path, start):
            end = line_end(piece) or (len(piece) if len(rest) + len(piece) >= LONGEST_LINE else 0)
            if end:
                raw = b"".join((rest, memoryview(piece)[:end]))  # copied once
                yield Block(offset, raw)
                offset, rest = offset + len(raw), piece[end:]
            else:
                rest += piece
        if rest:
            yield Block(offset, rest)
    except EOFError:
        raise LogFileError("the log is cut off: its compressed data has no end") from None
    except OSError as error:
        raise LogFileError(f"the log cannot be read: {error.strerror or error}") from None


def beginning(path: str | Path, size: int) -> bytes:
    """About the first `size` bytes, decompressed; LogFileError."""
    found = b""
    try:
        for piece in _pieces(path, 0):
            found += piece
            if len(found) >= size:
                break
    except (EOFError, OSError):
        pass  # what could be read
    return found[:size]


def end_of(path: str | Path, size: int) -> bytes:
    """The last `size` bytes of a file that is not compressed; nothing of one that is; LogFileError."""
    with closing(_open(path)) as file:
        if file.read(4).startswith(PACKED):
            return b""
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read(size)


def line_end(raw: bytes) -> int:
    """Where the last line ends that has an end; 0 for nowhere."""
    return max(raw.rfind(b"\n"), raw.rfind(b"\r")) + 1


def _open(path: str | Path) -> IO[bytes]:
    """The file, if it is one; LogFileError."""
    try:
        # opening a pipe would wait for somebody to write into it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise LogFileError(f"the log cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LogFileError("the log cannot be read: it is not a file")
    return open(descriptor, "rb", buffering=0)  # noqa: PTH123


def _pieces(path: str | Path, start: int) -> Iterator[bytes]:
    """The bytes of the file from `start`, decompressed; EOFError where compressed data is cut off."""
    with closing(_open(path)) as file:
        first = file.read(4)
        file.seek(start)
        if first.startswith(PACKED):
            yield from _unpacked(file, *(_zstd() if first.startswith(ZSTD) else (_gzip, zlib.error)))
        else:
            # making room for a whole block takes longer than reading a short log
            size = min(BLOCK, os.fstat(file.fileno()).st_size + 1)
            yield from iter(lambda: file.read(size), b"")


def _unpacked(file: IO[bytes], new: Callable[[], Any], damage: type[Exception]) -> Iterator[bytes]:
    """What the compressed frames of a file hold; one frame may follow another."""
    frame, unused = new(), b""
    while piece := unused or file.read(PACKED_BLOCK):
        frame = new() if frame.eof else frame
        try:
            yield frame.decompress(piece)
        except damage as error:
            raise LogFileError(f"the compressed data of the log is damaged: {error}") from None
        unused = frame.unused_data
    if not frame.eof:
        raise EOFError


def _gzip() -> Any:
    return zlib.decompressobj(zlib.MAX_WBITS | 16)


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    try:
        import zstandard
    except ImportError:
        raise LogFileError("the log is compressed by zstd, which needs a package: pip install zstandard") from None
    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
