"""Wait before the first step until it is the job's turn.

In: TURN, a folder; TURN_OWNER, the process of the benchmark. Out: the file `loaded` in the folder, once the first batch is
there; the first step, when the benchmark has made the file `go`; the file `done` after the last step.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

POLL_S = 0.1


class Turn(Callback):  # type: ignore[misc]
    """Waits in the first step, before anything of it is computed."""

    def __init__(self) -> None:
        self.folder, self.begun = Path(os.environ["TURN"]), False

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        if self.begun:
            return
        self._tell(trainer, "loaded")
        owner = Path("/proc", os.environ["TURN_OWNER"])
        while not (self.folder / "go").exists():
            if not owner.exists():
                raise SystemExit("bench: the benchmark has ended, so there is no turn")
            time.sleep(POLL_S)
        self.begun = True
        print(f"bench: turn begins {time.time():.3f}", flush=True)

    def on_train_end(self, trainer: Any, *_args: Any) -> None:
        self._finish()
        print(f"bench: turn ends {time.time():.3f}", flush=True)
        self._tell(trainer, "done")

    def _tell(self, trainer: Any, what: str) -> None:
        """Make the file when all ranks are here and their GPUs have nothing left to do."""
        self._finish()
        trainer.strategy.barrier(what)
        (self.folder / what).touch()

    @staticmethod
    def _finish() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
