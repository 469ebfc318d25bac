"""A log's bytes. In: the path of a file, plain, gzip'd or zstd'd. Out: blocks of whole lines, whatever the file's size.

Offsets count decompressed bytes. What a terminal would not show is taken out: colours, and the returns of progress bars.
"""

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
KNOWN_BY = 4096  # bytes at the beginning, and before a place, by which a file is known again
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


def is_packed(path: str | Path) -> bool:
    """Whether the file is compressed, by its first bytes; LogFileError where it cannot be read."""
    with closing(_open(path)) as file:
        return file.read(4).startswith(PACKED)


def blocks(path: str | Path, start: int = 0, end: int | None = None) -> Iterator[Block]:
    """The lines that begin from `start` to before `end`, in blocks; LogFileError after what could be read.

    A block ends where a line does, unless that line is longer than a block.
    """
    try:
        if start == 0 and end is None and (raw := _whole(path)) is not None:
            yield Block(0, raw)
            return
        offset = _first_line(path, start)
        with closing(_stream(path)) as file:
            _skip(file, offset)
            yield from _blocks(file, offset, end)
    except EOFError:
        raise LogFileError("the log is cut off: its compressed data has no end") from None
    except zlib.error as error:
        raise LogFileError(f"the log's compressed data is damaged: {error}") from None
    except OSError as error:
        raise LogFileError(f"the log cannot be read: {error.strerror or error}") from None


class Place(NamedTuple):
    """Where a block ends that will be the same however the file grows, and how to know the file again."""

    offset: int = 0
    read: int = 0  # bytes of the file that had to be there for the block to end so
    first: bytes = b""  # of the file
    last: bytes = b""  # before the offset
    file: tuple[int, int] = (0, 0)  # device and inode

    def is_in(self, path: str | Path) -> bool:
        """Whether the file still is as it was up to here, by its size and some bytes; LogFileError."""
        with closing(_open(path)) as file:
            first = file.read(len(self.first))
            file.seek(self.offset - len(self.last))
            last = file.read(len(self.last))
            same = (first, last, _identity(file)) == (self.first, self.last, self.file)
            return same and file.seek(0, os.SEEK_END) >= self.read


def added(path: str | Path, place: Place) -> Iterator[tuple[Block, Place | None]]:
    """The blocks behind a place, as `blocks` gives them, of a file that is not compressed; LogFileError.

    With each comes the place behind it; None where what is added to the file may belong to the block.
    """
    with closing(_open(path)) as file:
        if not place.read and file.seek(0, os.SEEK_END) <= BLOCK:
            file.seek(0)
            if raw := file.read(BLOCK):
                yield Block(0, raw), None
            return
        file.seek(place.offset)
        offset, read, first = place.offset, place.read, place.first
        rest = file.read(read - offset)
        while piece := file.read(BLOCK):
            raw, read = rest + piece, read + len(piece)
            last = max(raw.rfind(b"\n"), raw.rfind(b"\r")) + 1 or (len(raw) if len(raw) >= BLOCK else 0)
            if last:
                first = first or raw[:KNOWN_BY]
                known = Place(offset + last, read, first, raw[max(0, last - KNOWN_BY) : last], _identity(file))
                yield Block(offset, raw[:last]), known if len(piece) == BLOCK else None
            offset, rest = offset + last, raw[last:]
            if len(piece) < BLOCK:
                break  # what is being written meanwhile comes the next time
        if rest:
            yield Block(offset, rest), None


def _identity(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def edges(path: str | Path, size: int) -> tuple[bytes, bytes]:
    """The first and the last `size` bytes of a file that is not compressed; LogFileError."""
    with closing(_open(path)) as file:
        first = file.read(size)
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return first, file.read(size)


def line_number(path: str | Path, offset: int) -> int:
    """The number, from 1, of the line in which the byte at `offset` is."""
    number = 1
    with closing(_stream(path)) as file:
        while offset > 0 and (piece := file.read(min(BLOCK, offset))):
            number += piece.count(b"\n")
            offset -= len(piece)
    return number


def _blocks(file: "IO[bytes] | _Unpacked", offset: int, end: int | None) -> Iterator[Block]:
    rest = b""
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


def _first_line(path: str | Path, start: int) -> int:
    """Where the first line begins that does so at `start` or after it."""
    if start == 0:
        return 0
    offset = start - 1
    with closing(_stream(path)) as file:
        _skip(file, offset)
        while piece := file.read(BLOCK):
            if end := _line_end(piece):
                return offset + end
            offset += len(piece)
    return offset


def _line_end(raw: bytes, start: int = 0) -> int:
    """Where the line ends that `start` is in; 0 for nowhere."""
    ends = [at for at in (raw.find(b"\n", start), raw.find(b"\r", start)) if at >= 0]
    return min(ends) + 1 if ends else 0


def _whole(path: str | Path) -> bytes | None:
    """All of a file in one go; None if that is empty, compressed or larger than a block."""
    descriptor, size = _descriptor(path)
    try:
        raw = os.read(descriptor, size) if 0 < size <= BLOCK else b""
    finally:
        os.close(descriptor)
    return raw if raw and not raw.startswith(PACKED) else None


def _open(path: str | Path) -> IO[bytes]:
    return open(_descriptor(path)[0], "rb", buffering=0)  # noqa: PTH123


def _descriptor(path: str | Path) -> tuple[int, int]:
    """The file, open, and its size; LogFileError."""
    try:
        # a pipe would wait for somebody to write into it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise LogFileError(f"the log cannot be read: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise LogFileError("the log cannot be read: it is no file")
    return descriptor, status.st_size


def _stream(path: str | Path) -> "IO[bytes] | _Unpacked":
    """The file's bytes, decompressed."""
    file = _open(path)
    start = file.read(4)
    file.seek(0)
    return _Unpacked(file, zstd=start.startswith(ZSTD)) if start.startswith(PACKED) else file


def _skip(file: "IO[bytes] | _Unpacked", offset: int) -> None:
    """To `offset` from the beginning: at once, or by decompressing what lies before."""
    if isinstance(file, io.FileIO):
        file.seek(offset)
        return
    while offset > 0 and (piece := file.read(min(BLOCK, offset))):
        offset -= len(piece)


class _Unpacked:
    """A compressed file's bytes; EOFError where it is cut off, behind everything that could be read."""

    def __init__(self, file: IO[bytes], *, zstd: bool) -> None:
        self._file = file
        self._new = _zstd_frame if zstd else _gzip_member
        self._frame = self._new()
        self._left = b""

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        while not self._left:
            piece = self._frame.unused_data or self._file.read(BLOCK)
            if not piece:
                if not self._frame.eof:
                    raise EOFError
                return b""
            if self._frame.eof:  # another one follows
                self._frame = self._new()
            self._left = self._frame.decompress(piece)
        found, self._left = self._left[:size], self._left[size:]
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _gzip_member() -> Any:
    return zlib.decompressobj(zlib.MAX_WBITS | 16)


def _zstd_frame() -> Any:
    try:
        import zstandard
    except ImportError:
        raise LogFileError("the log is zstd'd, which needs a package: pip install zstandard") from None
    return _ZstdFrame(zstandard)


class _ZstdFrame:
    """zstandard's decompressor, with zlib's error."""

    def __init__(self, zstandard: Any) -> None:
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._error = zstandard.ZstdError

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._frame.unused_data)

    def decompress(self, piece: bytes) -> bytes:
        try:
            return bytes(self._frame.decompress(piece))
        except self._error as error:
            raise zlib.error(str(error)) from None
