"""What nvidia-smi says of a GPU while a job trains. In: the GPU. Out: clock, power, temperature and utilization."""

import os
import statistics
import subprocess
import threading

WORKING = 50  # percent of the time
FIELDS = ("clocks.sm", "power.draw", "temperature.gpu", "utilization.gpu")


class Clocks:
    """Asks nvidia-smi every few seconds from `begin` to `end`. `gpu`: default, the first that this process may use."""

    def __init__(self, gpu: str | None = None) -> None:
        self.gpu = gpu or os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.seen: list[list[float]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._end.set()

    def medians(self) -> dict[str, float] | None:
        """Of the last ten looks at a GPU that was working: the job takes a while to end."""
        if self._thread.is_alive():
            self._thread.join()
        working = [look for look in self.seen if look[FIELDS.index("utilization.gpu")] > WORKING]
        columns = zip(*working[-10:], strict=True)
        return dict(zip(FIELDS, map(statistics.median, columns), strict=True)) if working else None

    def _watch(self) -> None:
        query = ["nvidia-smi", "-i", self.gpu, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
        while not self._end.wait(3):
            try:
                answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout
                if not self._end.is_set():  # else it may be of the next job
                    self.seen.append([float(value) for value in answer.splitlines()[0].split(",")])
            except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
                return  # no clocks are reported
