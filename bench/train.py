"""NeMo's stock recipe and ftgen's side by side, on the GPUs at hand. In: specs. Out: bench/results/<date>-<gpu>.json.

    python bench/train.py bench/specs/*.toml --gpu h200 [--steps 60] [--repeats 1] [--set KEY=VALUE] [--also NAME] \
        [--without NAME]

Each spec is compiled twice, with `optimizations.preset` "stock" and as the spec has it, and both scripts run in turn, once a
repeat, with FTGEN_PYTHON or this interpreter. `--also NAME` adds the spec with one optimization more, `--without NAME` with
one less, and `--variants` chooses among them. The step times are those of the logs. `--kernels` profiles four more steps of
each with the PyTorch profiler: how long the GPU was busy, and with what.

`--at-once N` starts N jobs for each GPU at the same time. Each holds its loaded model until it is its turn: one at a time
trains on a GPU (at_once.py). `--gpus-at-once 0,1` spreads jobs of one GPU over these GPUs, all jobs of a spec on the same
one. Jobs at once have no node check, because it would measure the others too. `--limit` does not count the wait. Only NeMo's
jobs wait. Measure runs that the host limits one by one: jobs that wait take some of the host's time.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import at_once
from at_once import Job

from ftgen.logs.find import Run, find_runs
from ftgen.logs.read import read_log
from ftgen.results.summary import judge

HERE = Path(__file__).parent
VARIANTS = {"stock": ["--set", "optimizations.preset=stock"], "ftgen": []}
PACKAGES = ("torch", "nemo_toolkit", "megatron-core", "transformer-engine", "lightning")
ENERGY = ("joules_per_token", "gpu_power_w", "sm_clock_mhz", "throttled", "throttle_reasons", "max_temperature_c")
LOG = re.compile(r"^ftgen: log: (.+)$", re.MULTILINE)  # as a job's script says first


def main() -> int:
    """Compile, run in turn, collect; 1 if any run failed."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the jobs end with this program
    python = os.environ.get("FTGEN_PYTHON", sys.executable)
    variants = VARIANTS | {f"ftgen, {name}": ["--set", f"optimizations.{name}=true"] for name in options.also}
    variants |= {f"ftgen without {name}": ["--set", f"optimizations.{name}=false"] for name in options.without}
    if options.variants:
        variants = {name: variants[name] for name in options.variants}
    if options.at_once > 1:
        variants = {name: [*changes, "--site", str(at_once.TURN / "site.toml")] for name, changes in variants.items()}
    jobs = _jobs(variants, options)
    runs: dict[Job, dict[str, Any]] = {}
    for batch in at_once.batches(list(jobs), options.at_once):
        for what in (jobs[job] for job in batch):
            print(f"bench: {what['spec']}, {what['variant']}, repeat {what['repeat'] + 1}", file=sys.stderr, flush=True)
        for job in at_once.run(batch, environment(options, python), options.limit):
            runs[job] = jobs[job] | result(job, options)
            runs = {job: runs[job] for job in jobs if job in runs}
            _write(runs, options)
            print(json.dumps({key: runs[job][key] for key in ("spec", "variant", "status", "step_time_s")}), flush=True)
    if options.kernels:
        for job, run in runs.items():
            if run["repeat"] == 0 and "gpus" in run:
                run["kernels"] = _kernels(job.script, python, run["gpus"], options)
                _write(runs, options)
    return int(any(run["status"] != "complete" for run in runs.values()))


def _jobs(variants: dict[str, list[str]], options: argparse.Namespace) -> dict[Job, dict[str, Any]]:
    """Each job and what it is, in the order of the list. All jobs of a spec have the same GPU: they are compared."""
    scripts = [
        (spec, options.gpus_at_once[number % len(options.gpus_at_once)], variant, compiled(spec, variant, changes, options))
        for number, spec in enumerate(options.specs)
        for variant, changes in variants.items()
    ]
    return {
        Job(script, f".{repeat}", gpu): {"spec": spec.stem, "variant": variant, "repeat": repeat}
        for repeat in range(options.repeats)
        for spec, gpu, variant, script in scripts
    }


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
    parser.add_argument(
        "--at-once", type=int, default=1, help="jobs of a GPU that start at the same time, and train in turn"
    )
    parser.add_argument(
        "--gpus-at-once", type=lambda text: text.split(","), default=[None], help="numbers of GPUs to spread the specs over"
    )
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
    """One job alone; what `result` says."""
    (done,) = at_once.run([Job(script)], environment(options, python), options.limit)
    return result(done, options)


def result(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """What the job's log says, and what nvidia-smi said meanwhile."""
    found: dict[str, Any] = {"gpu": options.gpu} | ({"gpu_number": job.gpu} if job.gpu else {})
    log = LOG.search(job.output.read_text(errors="replace"))
    if not log:
        reason = f"it left no log; the end of its output: {tail(job.output)}"
        return found | {"status": "failed", "reason": reason, "step_time_s": None}
    (run,) = find_runs([log[1]])
    found |= {**described(run, options.stage.resolve()), "clocks": job.clocks.medians(), "versions": _versions()}
    if found["status"] == "complete" and job.loaded_s is None:
        found |= {"status": "failed", "reason": "it did not wait for its turn"}
    return found


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


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write(runs: dict[Job, dict[str, Any]], options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{date.today().isoformat()}-{options.gpu}.json"
    path.write_text(json.dumps({"runs": list(runs.values())}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
