"""Lightning's logger for MLflow, which goes on with the run of an earlier attempt.

In: a file for the run's id, which the first attempt writes. Out: a logger.

This module imports Lightning, so only a training imports it.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment


class ContinuedRun(MLFlowLogger):  # type: ignore[misc]
    """One run of MLflow for all attempts."""

    def __init__(self, id_file: str, **options: Any) -> None:
        self.id_file = Path(id_file)
        known = self.id_file.read_text(encoding="utf-8") if self.id_file.is_file() else None
        super().__init__(run_id=known, **options)

    @property
    @rank_zero_experiment  # type: ignore[untyped-decorator]
    def experiment(self) -> Any:
        """The client of MLflow. Its first use makes the run."""
        client = super().experiment
        if not self.id_file.is_file():
            self.id_file.parent.mkdir(parents=True, exist_ok=True)
            self.id_file.write_text(str(self._run_id), encoding="utf-8")
        return client
