"""Say where a job writes.

In: the environment. Out: paths.

Environment: FTGEN_RUN_DIR, which the job's script sets; STAGE_PATH.
"""

import os
from pathlib import Path


def run_directory() -> Path:
    """The folder of this run's log."""
    return Path(os.environ.get("FTGEN_RUN_DIR") or Path(os.environ.get("STAGE_PATH") or Path.cwd(), "logs"))
