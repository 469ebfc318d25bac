"""Give Triton and TorchInductor a folder for the kernels that they compile, unless the user has set one.

In: the environment. Out: TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR, and their folders.

Triton's default is in the home directory: in an image it may not be there, and on many clusters all ranks share it over a
network.
"""

import os
import tempfile
from pathlib import Path

FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}


def set_places() -> None:
    """Set the variables that are not set. The ranks of a node share the folders, which both programs allow."""
    missing = {variable: folder for variable, folder in FOLDERS.items() if not os.environ.get(variable)}
    if missing:
        place = _place()
        for variable, folder in missing.items():
            os.environ[variable] = str(place / folder)


def _place() -> Path:
    """A folder of this user on the node; without one, a folder of the run."""
    mine = Path(tempfile.gettempdir(), f"ftgen-{os.getuid()}")
    try:
        mine.mkdir(mode=0o700, exist_ok=True)
        if not mine.is_symlink() and mine.stat().st_uid == os.getuid() and os.access(mine, os.W_OK):
            return mine
    except OSError:  # the folder for temporary files is full, or read-only
        pass
    return Path(os.environ.get("FTGEN_RUN_DIR") or Path.cwd(), "cache", os.environ.get("SLURM_NODEID", "0"))
