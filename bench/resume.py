"""Resume a run on a GPU and compare it with a run without a break; and what a save costs.

In: specs of one GPU. Out: a line of JSON for each variant, and all of them in FILE.

    python bench/resume.py bench/specs/lora_bf16.toml bench/specs/lora_fp8.toml --gpu h100 [--variants plain,graphs]

Each spec is compiled without and with CUDA graphs, and without and with the fused MLP. Each variant trains twice: from the
first step to the last with two saves; and from the checkpoint in the middle to the last step, as after a kill. The losses of
the second run (exact, not as the log rounds them) and the bytes of its last checkpoint must be those of the first.

A spec with [save] and these options is refused (ftgen/plan/rules.py), until this program has shown that they resume exactly.
So the table [save] is written into the compiled plan here. Several runs start at once, but only one trains at a time.

Environment: FTGEN_PYTHON, the interpreter that has NeMo.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from filecmp import cmp
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDER = HERE.parent / "tests" / "runtime" / "recorder.py"
# The fused MLP keeps its FP8 scales outside of the model's modules, so a checkpoint does not have them.
VARIANTS = {
    "plain": {"cuda_graphs": "false", "fused_swiglu": "false"},
    "fused_swiglu": {"cuda_graphs": "false", "fused_swiglu": "true"},
    "graphs": {"cuda_graphs": "true", "fused_swiglu": "false"},
    "default": {"cuda_graphs": "true", "fused_swiglu": "true"},
}
SAVED = re.compile(r"ftgen: saved step (\d+) in ([\d.]+) s: \S+, (\S+) GiB")
STEP_TIME = re.compile(r"global_step: (\d+) .*train_step_timing in s: ([\d.e+-]+)")


def main() -> int:
    """Compile, convert, train each variant twice, compare; 1 if one differs or fails."""
    options = _options()
    options.stage.mkdir(parents=True, exist_ok=True)
    variants = [_variant(spec, name, options) for spec in options.specs for name in options.variants.split(",")]
    for entrypoint in {variant["spec"]: variant["entrypoint"] for variant in variants}.values():
        subprocess.run([_python(), entrypoint, "convert"], env=_environment(options), check=True)
    with ThreadPoolExecutor(options.at_once) as pool:
        results = list(pool.map(lambda variant: _measure(variant, options), variants))
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(not all(result.get("exact") for result in results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("specs", nargs="+", type=Path)
    parser.add_argument("--gpu", required=True, help="the GPU's name in the catalogue")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, with commas between them")
    parser.add_argument("--at-once", type=int, default=2, help="runs that share the GPU's memory")
    parser.add_argument("--set", action="append", default=[], help="a change to all specs, as of ftgen compile")
    parser.add_argument("--stage", type=Path, default=Path("resume-stage"), help="STAGE_PATH of the runs")
    parser.add_argument("--out", type=Path, default=Path("resume.json"))
    parser.add_argument("--limit", type=float, default=400, help="seconds that a run may take")
    options = parser.parse_args()
    options.stage = options.stage.resolve()
    return options


def _python() -> str:
    return os.environ.get("FTGEN_PYTHON", sys.executable)


def _environment(options: argparse.Namespace) -> dict[str, str]:
    # kernels that are not deterministic would differ from run to run without any resume
    return os.environ | {"STAGE_PATH": str(options.stage), "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}


def _variant(spec: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A variant's entrypoint, with [save] in its plan."""
    folder = options.stage / "code" / f"{spec.stem}-{name}"
    changes = [f"gpu={options.gpu}", f"max_steps={options.steps}", "window.last_steps=4", *options.set]
    if options.gpu != "cpu":
        changes += [f"optimizations.{key}={value}" for key, value in VARIANTS[name].items()]
    words = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-m", "ftgen", "compile", spec, *words, "--out", folder / "scripts"]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["bash", folder / "scripts" / f"{spec.stem}.sh", "--unpack", folder], check=True)
    entrypoint = folder / f"{spec.stem}.py"
    save = {"every_steps": options.steps // 2, "keep": 2, "checkpoint_bytes": 1}
    text = entrypoint.read_text()
    entrypoint.write_text(text.replace('"""\n{\n', f'"""\n{{\n  "save": {json.dumps(save)},\n', 1))
    return {"spec": spec.stem, "variant": name, "entrypoint": entrypoint}


def _measure(variant: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Both runs of a variant, compared."""
    name = f"{variant['spec']}-{variant['variant']}"
    whole, resumed = options.stage / "runs" / f"{name}-whole", options.stage / "runs" / f"{name}-resumed"
    begin = time.monotonic()
    found: dict[str, Any] = {"spec": variant["spec"], "variant": variant["variant"], "gpu": options.gpu}
    middle, last = f"checkpoints/step_{options.steps // 2}", f"checkpoints/step_{options.steps}"
    log = _train(variant["entrypoint"], whole, options)
    found |= _costs(log)
    if (whole / last).is_dir():
        shutil.copytree(whole / middle, resumed / middle)
        _train(variant["entrypoint"], resumed, options)
    if (resumed / last).is_dir():
        found |= _compared(whole, resumed, last)
    found["took_s"] = round(time.monotonic() - begin)
    print(json.dumps(found), flush=True)
    return found


def _train(entrypoint: Path, directory: Path, options: argparse.Namespace) -> str:
    """One training; its log."""
    directory.mkdir(parents=True, exist_ok=True)
    own = {"FTGEN_RUN_DIR": str(directory), "LOCK": str(options.stage / "lock")}
    command = ["timeout", str(options.limit), _python(), "-u", str(RECORDER), str(entrypoint), "finetune"]
    with (directory / "log.out").open("w") as log:
        subprocess.run(command, env=_environment(options) | own, stdout=log, stderr=log, check=False)
    return (directory / "log.out").read_text()


def _costs(log: str) -> dict[str, Any]:
    """Step times in seconds, and those of the step after a save; time and size of the saves."""
    saves = {int(step): (float(seconds), float(gib)) for step, seconds, gib in SAVED.findall(log)}
    times = {int(step): float(seconds) for step, seconds in STEP_TIME.findall(log)}
    others = [seconds for step, seconds in times.items() if step > 4 and step not in saves]
    return {
        "save_s": [seconds for seconds, _ in saves.values()],
        "save_gib": [gib for _, gib in saves.values()],
        "step_time_s": statistics.median(others) if others else None,
        "step_time_after_a_save_s": [seconds for step, seconds in times.items() if step in saves],
    }


def _compared(whole: Path, resumed: Path, last: str) -> dict[str, Any]:
    one, other = (_losses(directory) for directory in (whole, resumed))
    differences = [abs(one[step]["loss"] - other[step]["loss"]) for step in other]
    same_batches = all(one[step]["batch"] == other[step]["batch"] for step in other)
    files = sorted(path.name for path in (whole / last / "weights").glob("*.distcp"))
    same_weights = all(cmp(whole / last / "weights" / name, resumed / last / "weights" / name, False) for name in files)
    return {
        "steps_compared": len(differences),
        "largest_loss_difference": max(differences),
        "same_batches": same_batches,
        "same_weights": same_weights,
        "exact": max(differences) == 0 and same_batches and same_weights,
    }


def _losses(directory: Path) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (directory / "record.0").read_text().splitlines())
    return {line["step"]: line for line in lines if "step" in line}


if __name__ == "__main__":
    sys.exit(main())
