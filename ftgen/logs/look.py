"""Whether a file is a log: a look at its beginning and its end. In: a path. Out: a `Look`."""

import codecs
from enum import Enum
from functools import lru_cache
from pathlib import Path

from ftgen.logs import formats
from ftgen.logs.blocks import LogFileError, beginning, end_of

LOOKED_AT = 256 << 10  # bytes at the beginning, and as many at the end: frameworks talk a lot before the first step
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Look(Enum):
    """What a file seems to be; as text what an error calls it."""

    LOG = "a log"
    TEXT = "text without step lines"
    BINARY = "no text"
    ARCHIVE = "an archive"
    WIDE = "UTF-16 text"

    @property
    def hint(self) -> str:
        """What to do, if the file may hold logs that cannot be read."""
        return {Look.ARCHIVE: "unpack it", Look.WIDE: "iconv -f UTF-16 -t UTF-8 makes it readable"}.get(self, "")


def look_at(path: str | Path) -> Look:
    """What the file seems to be; BINARY too if it cannot be read."""
    try:
        status = Path(path).stat()
    except OSError:
        return Look.BINARY
    return _look(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=10_000)  # `ftgen watch` looks again and again
def _look(path: str | Path, _changed_ns: int, _size: int) -> Look:
    try:
        first = beginning(path, LOOKED_AT)
        if first[257:262] == b"ustar" or first.startswith(b"PK\x03\x04"):
            return Look.ARCHIVE
        if first.startswith(UTF_16):
            return Look.WIDE
        if b"\0" in first[:4096]:
            return Look.BINARY
        return Look.LOG if formats.words_in(first) or formats.words_in(end_of(path, LOOKED_AT)) else Look.TEXT
    except (LogFileError, OSError):
        return Look.BINARY
