"""A history to show: every real run of a GPU in tests/logs, and a planted regression.

PYTHONPATH=tests/show:. python tests/show/site_history.py FILE.sqlite
"""

import sys
from pathlib import Path
from random import Random

from ftgen.logs.find import find_runs
from ftgen.results.history import History
from ftgen.results.record import records

LOGS = Path(__file__).parents[1] / "logs"
REAL = [LOGS / name for name in ("h100", "h200", "h200_pair", "h200_parallel")]
H100 = REAL[0]
RUN = "1795387558"  # LoRA in FP8 on one H100
RUNS, SLOWER_FROM, SLOWER = 30, 18, 1.05
SPREAD = 0.005  # of the step times of repeats


def planted(file: Path) -> History:
    """Beside the real runs, thirty of one work: from the nineteenth on 5% slower, with another Transformer Engine."""
    history = History(file)
    real = records(find_runs(REAL))
    (model,) = [record for record in real if record["results"]["run_id"] == RUN]
    noise, made = Random(7), []
    for number in range(RUNS):
        slower = number >= SLOWER_FROM
        ratio = (SLOWER if slower else 1.0) * noise.gauss(1, SPREAD)
        results = {
            **model["results"],
            "run_id": str(1795390000 + number),
            "started": f"2026-11-{23 + number // 10}T{number % 10 + 8:02}:00:00",
        }
        for key in ("step_time_s", "days_per_1t_tokens"):
            results[key] = results[key] * ratio
        for key in ("tokens_per_s", "mfu", "tflops_per_gpu"):
            results[key] = results[key] / ratio
        packages = model["environment"]["packages"] | ({"transformer-engine": "2.10.0"} if slower else {})
        made.append(
            {
                **model,
                "results": results,
                "environment": {**model["environment"], "packages": packages},
                "log_sha256": f"{number:064}",
            }
        )
    history.add([*real, *made])
    return history


if __name__ == "__main__":
    planted(Path(sys.argv[1]))
