"""NeMo's stock recipe and ftgen's side by side, on the GPUs at hand. In: specs. Out: bench/results/<date>-<gpu>.json.

    python bench/train.py bench/specs/*.toml --gpu h200 [--steps 60] [--repeats 1] [--set KEY=VALUE] [--also NAME] \
        [--without NAME]

Each spec is compiled twice, with `optimizations.preset` "stock" and as the spec has it, and both scripts run in turn, once a
repeat, with FTGEN_PYTHON or this interpreter. `--also NAME` adds the spec with one optimization more, `--without NAME` with
one less, and `--variants` chooses among them. The step times are those of the logs. `--kernels` profiles four more steps of
each with the PyTorch profiler: how long the GPU was busy, and with what.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ftgen.logs.find import Run, find_runs
from ftgen.logs.read import read_log
from ftgen.results.summary import judge

HERE = Path(__file__).parent
VARIANTS = {"stock": ["--set", "optimizations.preset=stock"], "ftgen": []}
PACKAGES = ("torch", "nemo_toolkit", "megatron-core", "transformer-engine", "lightning")
ENERGY = ("joules_per_token", "gpu_power_w", "sm_clock_mhz", "throttled", "throttle_reasons", "max_temperature_c")
WORKING = 50  # percent of the time
CLOCKS = ("clocks.sm", "power.draw", "temperature.gpu", "utilization.gpu")


def main() -> int:
    """Compile, run in turn, collect; 1 if any run failed."""
    options = _options()
    python = os.environ.get("FTGEN_PYTHON", sys.executable)
    variants = VARIANTS | {f"ftgen, {name}": ["--set", f"optimizations.{name}=true"] for name in options.also}
    variants |= {f"ftgen without {name}": ["--set", f"optimizations.{name}=false"] for name in options.without}
    if options.variants:
        variants = {name: variants[name] for name in options.variants}
    scripts = [
        (spec, variant, compiled(spec, variant, changes, options))
        for spec in options.specs
        for variant, changes in variants.items()
    ]
    runs = []
    for repeat in range(options.repeats):
        for spec, variant, script in scripts:
            print(f"bench: {spec.stem}, {variant}, repeat {repeat + 1}", file=sys.stderr, flush=True)
            runs.append({"spec": spec.stem, "variant": variant, "repeat": repeat} | job(script, python, options))
            _write(runs, options)
            print(json.dumps({key: runs[-1][key] for key in ("spec", "variant", "status", "step_time_s")}), flush=True)
    if options.kernels:
        for run, (_, _, script) in zip(runs, scripts, strict=False):
            if "gpus" in run:
                run["kernels"] = _kernels(script, python, run["gpus"], options)
                _write(runs, options)
    return int(any(run["status"] != "complete" for run in runs))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("specs", nargs="+", type=Path)
    parser.add_argument("--gpu", required=True, help="the GPU's name in the catalogue")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="a change to all specs, as of ftgen compile")
    parser.add_argument("--also", action="append", default=[], help="an optimization to measure on top of the spec's")
    parser.add_argument("--without", action="append", default=[], help="an optimization of the spec to measure the lack of")
    parser.add_argument(
        "--variants", type=lambda text: text.split(";"), help="only these, for example 'ftgen;ftgen, op_fuser'"
    )
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--stage", type=Path, default=Path("bench-stage"), help="STAGE_PATH of the runs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that a run may take")
    return parser.parse_args()


def compiled(spec: Path, variant: str, changes: list[str], options: argparse.Namespace) -> Path:
    """The spec's script. SystemExit: ftgen refuses the spec, and has said why."""
    out: Path = options.stage / "scripts" / variant.replace(", ", "-").replace(" ", "-")
    settings = [f"gpu={options.gpu}", f"max_steps={options.steps}", *options.set]
    common = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "ftgen", "compile", str(spec), *common, *changes, "--out", str(out)]
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(1)
    return (out / f"{spec.stem}.sh").resolve()


def environment(options: argparse.Namespace, python: str) -> dict[str, str]:
    """Of a job."""
    return os.environ | {"STAGE_PATH": str(options.stage.resolve()), "FTGEN_PYTHON": python}


def job(script: Path, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """One job; what its log says, and what nvidia-smi said meanwhile."""
    before = {run.log for run in _runs(options)}
    clocks = Clocks()
    with clocks, (script.parent / f"{script.stem}.out").open("w") as output:
        command = ["timeout", str(options.limit), "bash", str(script)]
        subprocess.run(command, env=environment(options, python), stdout=output, stderr=output, check=False)
    found = [run for run in _runs(options) if run.log not in before]
    if not found:
        reason = f"it left no log; the end of its output: {tail(script.parent / f'{script.stem}.out')}"
        return {"gpu": options.gpu, "status": "failed", "reason": reason, "step_time_s": None}
    (run,) = found
    return {"gpu": options.gpu, **described(run, options.stage), "clocks": clocks.medians(), "versions": _versions()}


def tail(output: Path) -> str:
    """The last words of an output, on one line."""
    return " / ".join(output.read_text(errors="replace").split("\n")[-8:])[-800:].strip(" /")


def described(run: Run, stage: Path) -> dict[str, Any]:
    """What a run's log and plan say."""
    path, log = Path(run.log), read_log(run)
    summary = judge(run, log)
    steps = [log.steps[number] for number in sorted(log.steps)]
    return {
        "gpus": summary.gpus,
        "model": summary.model,
        "status": summary.status,
        "reason": summary.reason,
        "steps": summary.steps,
        "window": summary.window,
        "step_time_s": summary.step_time_s,
        "tokens_per_s_per_gpu": summary.tokens_per_s and summary.gpus and summary.tokens_per_s / summary.gpus,
        "mfu": summary.mfu,
        "peak_memory_gib": summary.peak_memory_gib,
        **{key: getattr(summary, key) for key in ENERGY},
        "published_step_time_s": summary.published_step_time_s,
        "step_times_s": [step.time_s for step in steps],
        "losses": [step.loss for step in steps],
        "optimizations": json.loads((path.parent / "plan.json").read_text())["optimizations"],
        "log": str(path.relative_to(stage)),
    }


def _runs(options: argparse.Namespace) -> list[Run]:
    logs = options.stage / "logs"
    return find_runs([logs]) if any(logs.rglob("log-*.out")) else []


def _kernels(script: Path, python: str, gpus: int, options: argparse.Namespace) -> Any:
    """GPU time by kernel over four steps, by bench/kernels.py; None where it failed."""
    output = script.with_suffix(".kernels.json")
    entrypoint = script.parent / "unpacked" / f"{script.stem}.py"
    subprocess.run(["bash", script, "--unpack", entrypoint.parent], check=True)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    command = ["timeout", str(options.limit), python, *launcher, *map(str, (HERE / "kernels.py", entrypoint, output))]
    with output.with_suffix(".out").open("w") as log:
        done = subprocess.run(command, env=environment(options, python), stdout=log, stderr=log, check=False)
    return json.loads(output.read_text()) if done.returncode == 0 and output.exists() else None


class Clocks:
    """Asks nvidia-smi every few seconds while it is entered."""

    def __enter__(self) -> "Clocks":
        self.seen: list[list[float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def medians(self) -> dict[str, float] | None:
        """Of the last ten looks at a GPU that was working: the job takes a while to end."""
        working = [look for look in self.seen if look[CLOCKS.index("utilization.gpu")] > WORKING]
        columns = zip(*working[-10:], strict=True)
        return dict(zip(CLOCKS, map(statistics.median, columns), strict=True)) if working else None

    def _watch(self) -> None:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        query = ["nvidia-smi", "-i", gpu, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
        while not self._stop.wait(3):
            try:
                answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout
                self.seen.append([float(value) for value in answer.splitlines()[0].split(",")])
            except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
                return  # no clocks are reported


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{date.today().isoformat()}-{options.gpu}.json"
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
