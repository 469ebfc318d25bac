"""The checkpoint's weights, read while NeMo is imported. In: a folder. Out: its files in the node's page cache, perhaps.

Loading then finds in memory what would come from a disk. Nothing depends on it: it stops at the first error, and leaves
alone what would fill more than half of the memory that is free.
"""

import contextlib
import os
import threading
from pathlib import Path

PIECE = 16 << 20  # bytes


def begin(folder: Path) -> threading.Thread | None:
    """Read the folder's files in a thread; None where another rank of this node does, or they are too large."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    try:
        files = sorted(path for path in folder.glob("*") if path.is_file())
        if sum(path.stat().st_size for path in files) > _free() // 2:
            return None
    except OSError:
        return None
    thread = threading.Thread(target=_read, args=(files,), name="read ahead", daemon=True)
    thread.start()
    return thread


def _read(files: list[Path]) -> None:
    """Plain reads, which let the interpreter go on: a shared file system may ignore advice."""
    buffer = bytearray(PIECE)
    with contextlib.suppress(OSError):
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _free() -> int:
    """Bytes of memory that are available; 0 where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
