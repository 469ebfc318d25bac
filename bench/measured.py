"""The catalogue's own measurements, from the results of this folder and their logs. Out: ftgen/catalogue/measured/*.toml.

    python bench/measured.py [--check]

A run counts if it is complete and its window begins after the first ten steps. Its power is the median that nvidia-smi said
while it ran; only that of a GPU that was busy in 60% of the time and more, because in some runs it was asked too late.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftgen.catalogue.measurements import HERE, MEASURED, Measured, from_run
from ftgen.errors import quoted
from ftgen.logs.find import find_runs
from ftgen.logs.read import read_log
from ftgen.results.record import record

ROOT = Path(__file__).parents[1]
LOGS = {"2026-11-22-h100": "h100", "2026-11-22-h200": "h200"}
LOGS |= {"2026-11-22-h200-pair": "h200_pair", "2026-11-23-h200-parallel": "h200_parallel"}
LOGS |= {"2026-11-28-h200-fused": "h200_fused", "2026-11-28-h200-one-go": "h200_one_go"}
LOGS |= {"2026-11-28-h200-last-layer": "h200_last_layer"}
ENGINES = "2026-11-27-h200-engines"  # which has no logs; its "what" says what was trained
BUSY = 60  # percent of the time
LEFT_OUT = {"source", "origin"}  # that the file says once


def main() -> int:
    """Write the files; with --check, 1 if one of them is not as it would be written."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for name, text in texts().items():
        path = HERE / f"{name}.toml"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not options.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    print("\n".join(f"{'stale' if options.check else 'written'}: {path.relative_to(ROOT)}" for path in stale))
    return int(options.check and bool(stale))


def texts() -> dict[str, str]:
    """The text of each file, by its name."""
    rows = {name: list(_rows(name, case)) for name, case in LOGS.items()} | {ENGINES: list(_engines())}
    return {name: "".join(_toml(name, found)) for name, found in rows.items()}


def _rows(name: str, case: str) -> Iterator[Measured]:
    results = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["runs"]
    clocks = {Path(run["log"]).name: run.get("clocks") or {} for run in results}
    for run in find_runs([ROOT / "tests" / "logs" / case / "logs"]):
        of = record(run, read_log(run))
        row = from_run(of["results"], of["plan"], "", MEASURED)
        if row:
            seen = clocks.get(Path(run.log).name, {})
            busy = seen.get("utilization.gpu", 0) >= BUSY
            yield row._replace(step_time_s=round(row.step_time_s, 6), power_w=round(seen["power.draw"], 1) if busy else None)


def _engines() -> Iterator[Measured]:
    """The stock recipes of both engines. The file does not say which optimizations the other runs had."""
    for run in json.loads((ROOT / "bench" / "results" / f"{ENGINES}.json").read_text())["runs"]:
        if run["variant"] == "stock":
            yield Measured(
                model="llama3_8b",
                gpu="h200",
                scheme="lora",
                precision=run["precision"],
                engine=run["engine"],
                gpus=1,
                global_batch_size=4,
                seq_length=4096,
                split=(1, 1, 1),
                lora_targets=("linear_qkv",),
                fp8_scaling=run["fp8_scaling"],
                step_time_s=run["median_step_time_s_of_steps_12_to_20"],
                source="",
            )


def _toml(name: str, rows: list[Measured]) -> Iterator[str]:
    source = f"bench/results/{name}.json"
    logs = f", with the logs in tests/logs/{LOGS[name]}" if name in LOGS else ""
    yield f"# Written by bench/measured.py from {source}{logs}. Step time in seconds, power in watts.\n"
    yield f"source = {quoted(source)}\n"
    defaults = Measured._field_defaults
    for row in rows:
        yield "\n[[run]]\n"
        for key, value in row._asdict().items():
            if key not in LEFT_OUT and value is not None and (key not in defaults or value != defaults[key]):
                yield f"{key} = {_value(value)}\n"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
