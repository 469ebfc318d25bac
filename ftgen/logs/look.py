"""Whether a file is a log: a look at its beginning and its end. In: a path. Out: what it seems to be, as errors call it."""

import codecs
from functools import lru_cache
from pathlib import Path

from ftgen.logs import formats
from ftgen.logs.blocks import LogFileError, blocks

LOOKED_AT = 256 << 10  # bytes at the beginning, and as many at the end: frameworks talk a lot before the first step
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

LOG, TEXT, NO_TEXT, ARCHIVE, WIDE = "a log", "text without step lines", "no text", "an archive", "UTF-16 text"
HINTS = {ARCHIVE: "unpack it", WIDE: "iconv -f UTF-16 -t UTF-8 makes it readable"}  # these may hold logs that cannot be read


def look_at(path: str | Path) -> str:
    """What the file seems to be; NO_TEXT too if it cannot be read."""
    try:
        status = Path(path).stat()
        return _look(path, status.st_size, status.st_mtime_ns)
    except (LogFileError, OSError):
        return NO_TEXT


@lru_cache(maxsize=10_000)  # `ftgen watch` looks again and again
def _look(path: str | Path, size: int, _changed_ns: int) -> str:
    first, last = (next(blocks(path, start), b"")[:LOOKED_AT] for start in (0, max(0, size - LOOKED_AT)))
    if first[257:262] == b"ustar" or first.startswith(b"PK\x03\x04"):
        return ARCHIVE
    if first.startswith(UTF_16):
        return WIDE
    if b"\0" in first[:4096]:
        return NO_TEXT
    return LOG if formats.words_in(first) or formats.words_in(last) else TEXT
