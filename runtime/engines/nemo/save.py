"""Save a NeMo training while it runs, with a Lightning callback. runtime/engines/saving.py has what both engines share.

In: a recipe, and what is saved where (`Saves`). Out: the recipe with a callback.

NeMo's own ModelCheckpoint is not used. If it is killed while it writes its second copy, `-last`, no resume is possible.

This module imports Lightning, so only a training imports it.
"""

import queue
from pathlib import Path
from typing import Any

import nemo_run as run
from lightning.pytorch.callbacks import Checkpoint
from megatron.core.dist_checkpointing.strategies import filesystem_async

from runtime.engines.saving import Saves, Saving
from runtime.job import stop


def add(recipe: Any, saves: Saves) -> None:
    """Add the callback to the recipe."""
    recipe.trainer.enable_checkpointing = True
    recipe.trainer.strategy.ckpt_async_save = False
    filesystem_async._results_queue = queue.Queue()  # Megatron's own is a server process, for asynchronous saves
    recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(Save, tuple(saves))]


class Save(Checkpoint):  # type: ignore[misc]
    """Calls `Saving` when Lightning begins and ends a step.

    Lightning calls a `Checkpoint` after all other callbacks. So NeMo's timer has stopped when a save begins: the times of
    the step lines are without saves.
    """

    last_model_path = ""  # NeMo sets it when it resumes

    def __init__(self, saves: tuple[Any, ...]) -> None:
        self.saving = Saving(Saves(*saves))
        self.waiting = False  # for a validation, before the save

    def on_train_start(self, *_args: Any) -> None:
        """Before the first step."""
        self.saving.begin()

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """Before a step."""
        self.saving.before_step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
        """Save, if it is time to. If this step is validated too, do it after the validation.

        A run that is resumed does not repeat the validation of the step that it goes on from.
        """
        if self.saving.after_step(trainer.global_step):
            loop = trainer.fit_loop
            self.waiting = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
            if not self.waiting:
                self._save(trainer)

    def on_validation_end(self, trainer: Any, *_args: Any) -> None:
        """Save, if a save waited for this validation."""
        if self.waiting:
            self.waiting = False
            self._save(trainer)

    def on_save_checkpoint(self, _trainer: Any, _module: Any, checkpoint: dict[str, Any]) -> None:
        """Count the current batch as completed. Lightning does so only after this callback.

        A resumed run would count one batch less, and validate one step later than it should.
        """
        for part in ("total", "current"):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"][part]
            progress["completed"] = progress["processed"]

    def _save(self, trainer: Any) -> None:
        def write(folder: Path) -> None:
            trainer.save_checkpoint(folder, weights_only=False)

        if finish := getattr(trainer.progress_bar_callback, "finish", None):  # with the optimization async_step
            finish()
        self.saving.save(trainer.global_step, write)
        if self.saving.stopping:
            raise SystemExit(stop.AGAIN)
