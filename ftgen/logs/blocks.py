"""The bytes of a log. In: the path of a file, plain or compressed by gzip or zstd. Out: blocks of whole lines.

`shown` removes from a block what a terminal would not show: colours, and the carriage returns of bars.
"""

import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
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


def shown(raw: bytes) -> bytes:
    """The lines as a terminal shows them, each ended by a newline. A `\\r\\n` ends a line that is no row of the file."""
    text = ESCAPE.sub(b"", raw) if b"\x1b" in raw else raw
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\r\n")
    if text.startswith(b'{"log":"'):
        text = DOCKER.sub(lambda match: match[1].replace(b'\\"', b'"') + b"\n", text)
    return text


def rows(text: bytes) -> int:
    """How many rows of the file end in a text that is `shown`."""
    newlines = len(text) - len(text.replace(b"\n", b""))  # a third of the time that count(b"\n") takes
    return newlines - (text.count(b"\r") if b"\r" in text else 0)  # finding a byte is six times faster than counting it


def stands_in(path: str | Path, offset: int, first: bytes, last: bytes) -> tuple[int, int] | None:
    """Device and inode of the file, if it begins with `first` and has `last` before the offset; LogFileError."""
    with closing(_open(path)) as file:
        status = os.fstat(file.fileno())
        there = file.read(len(first))
        file.seek(offset - len(last))
        return (status.st_dev, status.st_ino) if (there, file.read(len(last))) == (first, last) else None


def blocks(path: str | Path, start: int = 0) -> Iterator[bytes]:
    """The lines from the one that begins at `start`, in blocks; LogFileError behind what could be read.

    A block ends where a line does, unless that line is very long or has no end. A compressed file is read from its start.
    """
    rest = b""
    try:
        for piece in _pieces(path, start):
            end = line_end(piece) or (len(piece) if len(rest) + len(piece) >= LONGEST_LINE else 0)
            if end:
                yield b"".join((rest, memoryview(piece)[:end]))  # copied once
                rest = piece[end:]
            else:
                rest += piece
    except EOFError:
        raise LogFileError("the log is cut off: its compressed data has no end") from None
    except OSError as error:
        raise LogFileError(f"the log cannot be read: {error.strerror or error}") from None
    if rest:
        yield rest


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
    """The bytes of the file from `start`, or all that are compressed in it; EOFError where compressed data is cut off."""
    with closing(_open(path)) as file:
        first = file.read(4)
        file.seek(0 if first.startswith(PACKED) else start)
        if first.startswith(GZIP):
            yield from _unpacked(file, lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), zlib.error)
        elif first.startswith(ZSTD):
            yield from _unpacked(file, *_zstd())
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


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    try:
        import zstandard
    except ImportError:
        raise LogFileError("the log is compressed by zstd, which needs a package: pip install zstandard") from None
    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
