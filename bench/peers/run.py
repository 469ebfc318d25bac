"""ftgen and what a user would pick instead, on the same work, in turn, on the GPU at hand.

    python bench/peers/run.py bench/specs/lora_bf16.toml --gpu h200 [--steps 60] [--repeats 1] [--variants ftgen,hf-compile]

In: specs of LoRA on one GPU. Out: bench/results/<date>-<gpu>-peers.json, written after each run, so that a cut-off keeps
what has ended; a second call of the same day adds to it. A run that fails is in it with its error, and the exit status is 1.

NeMo's stock recipe ("stock") and ftgen run as in bench/train.py. A peer trains on the packs that they left in STAGE_PATH, so
ftgen comes first (bench/peers/one.py lists the peers). All peers start from the same random weights: one whose first loss
differs from that of the first peer does other work, and has failed. All run with FTGEN_PYTHON or this interpreter, which
needs bench/peers/requirements.txt. Step time, spread, memory and energy are read by ftgen from the step lines and the
telemetry of each run, in the same way for all.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(2, str(Path(__file__).resolve().parents[2]))

import train
from clocks import Clocks

from ftgen.logs.find import find_runs

HERE = Path(__file__).resolve().parent
NEMO = {"stock": train.VARIANTS["stock"], "ftgen": train.VARIANTS["ftgen"]}
PEERS = {
    "bf16": ["hf-compile", "hf-liger", "hf-liger-compile", "torchtune-compile", "hf-sdpa"],
    "fp8": ["hf-fp8-compile", "hf-fp8-liger-compile"],
    "fp32": ["hf", "hf-sdpa"],
}
SAME_LOSS = 0.05  # between the first losses of two peers, in BF16 or FP8; a leak of attention or other labels change more
ALLOCATED = re.compile(r"max_memory_allocated: (\d+)")
OWN = ("optimizations", "mfu", "published_step_time_s")  # what a plan says of ftgen, and not of a peer


def main() -> int:
    """Run in turn, collect; 1 if any run failed."""
    options = _options()
    python = os.environ.get("FTGEN_PYTHON", sys.executable)
    runs: list[dict[str, Any]] = []  # of this call
    earlier = _earlier(options)
    plans = {spec: _plan(spec, options) for spec in options.specs}
    for repeat in range(options.repeats):
        for spec, plan in plans.items():
            for variant in options.variants or [*NEMO, *PEERS[plan["precision"]]]:
                print(f"bench: {spec.stem}, {variant}, repeat {repeat + 1}", file=sys.stderr, flush=True)
                found = _nemo(spec, variant, python, options) if variant in NEMO else _peer(plan, variant, python, options)
                found |= _other_work(found, [*earlier, *runs])
                runs.append({"spec": spec.stem, "variant": variant, "repeat": repeat} | found)
                _file(options).write_text(json.dumps({"runs": [*earlier, *runs]}, indent=1) + "\n")
                print(json.dumps(_short(runs[-1])), flush=True)
    return int(any(run["status"] != "complete" for run in runs))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("specs", nargs="+", type=Path)
    parser.add_argument("--gpu", required=True, help="the GPU's name in the catalogue")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="a change to all specs, as of ftgen compile")
    parser.add_argument("--variants", type=lambda text: text.split(","), help="stock, ftgen and peers; default: all")
    parser.add_argument("--stage", type=Path, default=Path("bench-stage"), help="STAGE_PATH of the runs")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a run may take")
    return parser.parse_args()


def _plan(spec: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The spec's plan. SystemExit: ftgen refuses the spec, and has said why."""
    settings = [f"gpu={options.gpu}", f"max_steps={options.steps}", *options.set]
    sets = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "ftgen", "plan", str(spec), *sets, "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(1)
    return dict(json.loads(done.stdout))


def _nemo(spec: Path, variant: str, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """A run of bench/train.py."""
    found = train.job(train.compiled(spec, variant, NEMO[variant], options), python, options)
    return found | _more(found, options)


def _peer(plan: dict[str, Any], peer: str, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """A run of bench/peers/one.py; with "error" if it failed."""
    folder = options.stage / "peers" / f"{plan['name']}-{peer}-{time.time_ns() // 10**9}"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    log, out = folder / f"log-local.{plan['experiment']}_{time.time_ns() // 10**9}_0.out", folder / "out.json"
    home = str(options.stage.resolve() / "HF_ckpt")
    own = {"FTGEN_RUN_DIR": str(folder.resolve()), "NEMO_HOME": home, "HF_HUB_OFFLINE": "1"}
    command = ["timeout", options.limit, python, "-u", HERE / "one.py", folder / "plan.json", peer, out]
    clocks = Clocks()
    clocks.begin()
    with log.open("w") as output:
        environment = train.environment(options, python) | own
        done = subprocess.run(list(map(str, command)), env=environment, stdout=output, stderr=output, check=False)
    clocks.end()
    (run,) = find_runs([folder])
    found = {key: value for key, value in train.described(run, options.stage).items() if key not in OWN}
    found |= {"gpu": options.gpu, "clocks": clocks.medians(), **_more(found, options)}
    if done.returncode:
        return found | {"status": "failed", "error": f"exit status {done.returncode}: {train.tail(log)}"}
    return found | dict(json.loads(out.read_text()))


def _more(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The spread of the step times, and the memory that tensors took: `peak_memory_gib` is what the allocator reserved."""
    if not found.get("step_time_s"):
        return {}
    times = found["step_times_s"][-found["window"] :]
    allocated = ALLOCATED.findall((options.stage / found["log"]).read_text(errors="replace"))
    return {
        "spread_s": statistics.pstdev(times),
        "peak_allocated_gib": max(map(int, allocated)) / 2**30 if allocated else None,
    }


def _short(run: dict[str, Any]) -> dict[str, Any]:
    keys = ("spec", "variant", "status", "reason", "error", "step_time_s", "spread_s", "peak_memory_gib", "joules_per_token")
    return {key: run[key] for key in keys if run.get(key) is not None} | {"first_losses": run.get("losses", [])[:2]}


def _other_work(found: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
    """What to change in a run whose first loss is not that of the first peer."""
    firsts = [run["losses"][0] for run in before if "peer" in run and run["status"] == "complete"]
    if "peer" not in found or not firsts or abs(found["losses"][0] - firsts[0]) <= SAME_LOSS:
        return {}
    why = f"not the same work: its first loss is {found['losses'][0]:.4f}, that of the first peer {firsts[0]:.4f}"
    return {"status": "failed", "error": why}


def _file(options: argparse.Namespace) -> Path:
    return Path(options.out, f"{date.today().isoformat()}-{options.gpu}-peers.json")


def _earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of earlier calls of this day."""
    options.out.mkdir(parents=True, exist_ok=True)
    return list(json.loads(_file(options).read_text())["runs"]) if _file(options).exists() else []


if __name__ == "__main__":
    sys.exit(main())
