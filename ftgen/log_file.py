"""A log's bytes. In: the path of a file, plain, gzip'd or zstd'd. Out: blocks of whole lines, whatever the file's size.

Offsets count decompressed bytes. What a terminal would not show is taken out: colours, and the returns of progress bars.
"""

import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple

BLOCK = 1 << 17  # bytes: what fits a processor's cache is read fastest
PACKED = (GZIP, ZSTD) = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # the first bytes: RFC 1952, RFC 8878
ESCAPE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\))")  # ECMA-48: CSI, OSC


class LogFileError(Exception):
    """Why a log is not read to its end; what came before has been."""


class Block(NamedTuple):
    """Some lines of a log."""

    offset: int
    raw: bytes

    @property
    def text(self) -> bytes:
        """The lines as a terminal shows them, each ended by one newline."""
        text = self.raw
        if b"\x1b" in text:
            text = ESCAPE.sub(b"", text)
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return text


def is_packed(path: Path) -> bool:
    """Whether the file is compressed, by its first bytes; LogFileError where it cannot be read."""
    with closing(_open(path)) as file:
        return file.read(4).startswith(PACKED)


def blocks(path: Path, start: int = 0, end: int | None = None) -> Iterator[Block]:
    """The lines that begin from `start` to before `end`, in blocks; LogFileError after what could be read.

    A block ends where a line does, unless that line is longer than a block. What is_packed begins at its beginning.
    """
    with closing(_stream(path)) as file:
        try:
            yield from _blocks(file, start, end)
        except EOFError:
            raise LogFileError("the log is cut off: its compressed data has no end") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise LogFileError(f"the log's compressed data is damaged: {error}") from None
        except OSError as error:
            raise LogFileError(f"the log cannot be read: {error.strerror or error}") from None


def block_at(path: Path, offset: int, length: int) -> Block:
    """A block that was read before, once more."""
    with closing(_stream(path)) as file:
        _skip(file, offset)
        return Block(offset, file.read(length))


def line_number(path: Path, offset: int) -> int:
    """The number, from 1, of the line in which the byte at `offset` is."""
    number = 1
    with closing(_stream(path)) as file:
        while offset > 0 and (piece := file.read(min(BLOCK, offset))):
            number += piece.count(b"\n")
            offset -= len(piece)
    return number


def _blocks(file: IO[bytes], start: int, end: int | None) -> Iterator[Block]:
    offset, rest = _first_line(file, start), b""
    _skip(file, offset)
    while (end is None or offset < end) and (piece := file.read(BLOCK)):
        raw = rest + piece if rest else piece
        last = max(raw.rfind(b"\n"), raw.rfind(b"\r")) + 1
        if end is not None and offset + len(raw) >= end:
            last = _line_end(raw, end - offset - 1) or last  # the line that `end` cuts is the last one
        if last == 0 and len(raw) >= BLOCK:
            last = len(raw)
        if last:
            yield Block(offset, raw[:last])
        offset, rest = offset + last, raw[last:]
    if rest and (end is None or offset < end):
        yield Block(offset, rest)


def _first_line(file: IO[bytes], start: int) -> int:
    """Where the first line begins that does so at `start` or after it."""
    if start == 0:
        return 0
    file.seek(start - 1)
    offset = start - 1
    while piece := file.read(BLOCK):
        if end := _line_end(piece):
            return offset + end
        offset += len(piece)
    return offset


def _line_end(raw: bytes, start: int = 0) -> int:
    """Where the line ends that `start` is in; 0 for nowhere."""
    ends = [at for at in (raw.find(b"\n", start), raw.find(b"\r", start)) if at >= 0]
    return min(ends) + 1 if ends else 0


def _open(path: Path) -> IO[bytes]:
    try:
        # a pipe would wait for somebody to write into it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise LogFileError(f"the log cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LogFileError("the log cannot be read: it is no file")
    return open(descriptor, "rb", buffering=0)  # noqa: PTH123


def _stream(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    file = _open(path)
    start = file.read(4)
    file.seek(0)
    if start.startswith(GZIP):
        return io.BufferedReader(_Gzip(file), BLOCK)
    if start.startswith(ZSTD):
        return io.BufferedReader(_Zstd(file), BLOCK)
    return file


def _skip(file: IO[bytes], offset: int) -> None:
    """To `offset` from the beginning: at once, or by decompressing what lies before."""
    if isinstance(file, io.FileIO):
        file.seek(offset)
        return
    while offset > 0 and (piece := file.read(min(BLOCK, offset))):
        offset -= len(piece)


class _Gzip(gzip.GzipFile):
    """A gzip'd file as a stream that closes the file with itself."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._file = file

    def close(self) -> None:
        super().close()
        self._file.close()


class _Zstd(io.RawIOBase):
    """A zstd'd file as a stream; EOFError where it is cut off."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            file.close()
            raise LogFileError("the log is zstd'd, which needs a package: pip install zstandard") from None
        self._file = file
        self._frame = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._open_frame = self._frame.decompressobj()
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = self._open_frame.unused_data or self._file.read(BLOCK >> 3)
            if self._open_frame.eof and piece:
                self._open_frame = self._frame.decompressobj()
            elif not piece:
                if not self._open_frame.eof:
                    raise EOFError
                return 0
            try:
                self._left = self._open_frame.decompress(piece)
            except self._error as error:
                raise zlib.error(str(error)) from None
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
