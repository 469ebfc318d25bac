"""How fast logs are read: `grep -c train_step_timing`, a plain Python parser and ftgen, in turns, over the same bytes.

    python bench/reading.py [--scale 0.01] [--rounds 5]

Writes the logs into a temporary directory (4.5 GB at full scale) and removes them, writes bench/results/<date>-reading.json
and prints the table of docs/reading-logs.md.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WORD = "train_step_timing"
STEPS, GPUS, BATCH = 100, 8, 32
EXPERIMENT = "lora_nemo_llama3_8b_fp8_8"
LINE = (
    "Training epoch 0, iteration {step}/{last} | lr: {lr:.4} | global_batch_size: 32 | global_step: {step} | "
    "peak_memory_usage: 52613349376 | memory_allocated: 34359738368 | reduced_train_loss: {loss:.4} | "
    "train_step_timing in s: {time_s:.4} | consumed_samples: {samples}\n"
)
CHATTER = "[NeMo W 2025-01-01 00:{:02}:{:02} nemo_logging:405] /opt/venv/lib/site-packages/{:x}.py:{}: UserWarning: {:x}\n"

# A parser as one writes it in five minutes, and its process.
PLAIN = """
import re, sys
from pathlib import Path
from typing import Any
LINE = re.compile(r"global_step: (\\d+).*train_step_timing in s: ([\\d.e+-]+)")
for log in sorted(Path(sys.argv[1]).rglob("log-*.out")):
    times = {}
    with log.open() as file:
        for line in file:
            if match := LINE.search(line):
                times[int(match[1])] = float(match[2])
    last = [times[step] for step in sorted(times)[-20:]]
    print(sum(last) / len(last))
"""
# ftgen's process: what `ftgen tabulate` does, but for printing the table
FTGEN = """
import sys
from ftgen.logs.find import runs_below
from ftgen.results.summary import summarize_all
for summary in summarize_all(runs_below(sys.argv[1:])):
    print(summary.step_time_s)
"""


def step_lines(steps: int, random_: random.Random, talk: int = 0) -> Iterator[str]:
    """A log of so many steps, with `talk` other lines between any two."""
    for step in range(steps):
        time_s = 0.68 + random_.random() / 100
        loss = 12 - 3 * step / steps
        yield LINE.format(
            step=step, last=steps - 1, lr=1e-8 * (step + 1), loss=loss, time_s=time_s, samples=BATCH * (step + 1)
        )
        for _ in range(talk):
            yield CHATTER.format(step % 60, step % 60, random_.getrandbits(64), step, random_.getrandbits(64))


def many_runs(folder: Path, scale: float) -> None:
    """10,000 runs of 100 steps in the recipe's layout."""
    random_ = random.Random(1)
    for run in range(max(1, round(10_000 * scale))):
        place = folder / "experiments" / EXPERIMENT / f"{EXPERIMENT}_{run}" / EXPERIMENT
        place.mkdir(parents=True)
        (place / f"log-acct.{EXPERIMENT}_{run}_0.out").write_text("".join(step_lines(STEPS, random_)))


def one_log(folder: Path, scale: float, talk: int, total: float = 2e9) -> None:
    """One log of 2 GB."""
    random_ = random.Random(2)
    length = sum(map(len, step_lines(1, random_, talk))) + 25
    with (folder / f"log-acct.{EXPERIMENT}_1_0.out").open("w") as file:
        file.writelines(step_lines(round(total * scale / length), random_, talk))


CORPORA: dict[str, Callable[[Path, float], None]] = {
    "10,000 runs of 100 steps": many_runs,
    "one log of 2 GB, step lines": lambda folder, scale: one_log(folder, scale, talk=0),
    "one log of 2 GB, 9 other lines a step": lambda folder, scale: one_log(folder, scale, talk=9),
}


def timed(command: list[str]) -> tuple[dict[str, float], str]:
    """Seconds by the clock and of all cores, peak memory in bytes (of the largest process), and what was printed."""
    begin = time.perf_counter()
    # modules are compiled in the first round, as pip does when it installs them
    own = {"PYTHONPATH": str(HERE.parent), "PYTHONDONTWRITEBYTECODE": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | own)
    text = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if process.returncode not in {0, 1}:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_memory_bytes": memory}, text


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """The best of some rounds, each of which runs every reader once: whatever else the machine does hits all of them."""
    readers = {
        "grep": ["grep", "-rc", WORD, str(folder)],
        "plain": [sys.executable, "-c", PLAIN, str(folder)],
        "ftgen": [sys.executable, "-c", FTGEN, str(folder)],
    }
    best: dict[str, dict[str, float]] = {}
    texts = {}
    for _ in range(rounds):
        for name, command in readers.items():
            found, texts[name] = timed(command)
            before = best.setdefault(name, found)
            best[name] = {key: (max if key == "peak_memory_bytes" else min)(before[key], found[key]) for key in found}
    means = {name: sorted(round(float(line), 9) for line in texts[name].split()) for name in ("plain", "ftgen")}
    if means["plain"] != means["ftgen"]:
        raise SystemExit("the two parsers do not agree")
    counts = [int(re.sub(r".*:", "", line)) for line in texts["grep"].splitlines()]
    return {"lines": {"count": float(sum(counts))}, **best}


def main() -> None:
    """Make, measure, remove; write the result, print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--scale", type=float, default=1.0, help="of the logs' sizes")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--output", type=Path, default=HERE / "results" / f"{date.today()}-reading.json")
    given = options.parse_args()
    results: dict[str, Any] = {}
    for title, make in CORPORA.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make(folder, given.scale)
            size = sum(path.stat().st_size for path in folder.rglob("*.out"))
            results[title] = {"bytes": size, **measure(folder, given.rounds)}
    record = {
        "command": f"python bench/reading.py --scale {given.scale} --rounds {given.rounds}",
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load_average": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "results": results,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(record, indent=2) + "\n")
    print(table(results))


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: seconds by the clock, and in brackets of all cores."""
    lines = ["| logs | grep | plain Python | ftgen | ftgen / grep | ftgen's memory |", "|---|---|---|---|---|---|"]
    for title, result in results.items():
        times = [result[name] for name in ("grep", "plain", "ftgen")]
        cells = [f"{time_['seconds']:.2f} s ({time_['cpu_seconds']:.2f})" for time_ in times]
        ratio = f"{times[2]['seconds'] / times[0]['seconds']:.1f} ({times[2]['cpu_seconds'] / times[0]['cpu_seconds']:.1f})"
        memory = f"{times[2]['peak_memory_bytes'] / 2**20:.0f} MiB"
        lines.append(f"| {' | '.join((title, *cells, ratio, memory))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
