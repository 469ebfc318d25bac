"""Read the checkpoint into the page cache while the engine is imported, so that loading it is faster.

In: a folder. Out: a thread that reads the folder's files.

The training does not depend on it: the thread stops at the first error, and does not start if the files need more
than half of the available memory.
"""

import contextlib
import os
import threading
from pathlib import Path

from runtime.job import memory, signals

PIECE = 16 << 20  # bytes


def begin(folder: Path) -> threading.Thread | None:
    """Start the thread. None on ranks other than the first of a node, and if the files are too large."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    try:
        files = sorted(path for path in folder.glob("*") if path.is_file())
        if sum(path.stat().st_size for path in files) > memory.available() // 2:
            return None
    except OSError:
        return None
    return signals.start_thread(_read, files)


def _read(files: list[Path]) -> None:
    """Read the files. Plain reads release the GIL; a shared file system may ignore posix_fadvise."""
    buffer = bytearray(PIECE)
    with contextlib.suppress(OSError):
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
