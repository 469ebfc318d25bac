"""Does the fast run learn what the stock recipe learns? In: a spec. Out: a table of differences, next to the noise.

    python bench/compare.py bench/specs/sft_fp8_slice.toml --gpu h200 [--each | --only NAME] [--steps 24] [--stage DIR] \
        [--at-once 4] [--random]

Trains with the stock recipe, then with the spec's optimizations, or with --each of them alone, or --only those named, each
alone, from the same weights, data and seed. What the noise is show two more: the stock recipe again (attention's backward
pass is not deterministic; --deterministic makes it so, at a price in memory and time), and with one weight nudged by one
unit in the last place. For each: the largest difference of loss and grad norm, and how far the trained weights moved apart,
as a fraction of how far they moved (sampled; float32). Exit 1 where a run strays: where its weights moved apart by more than
--tolerance and by more than twice what the noise did. --at-once trains so many at the same time, in turn on the GPUs of
CUDA_VISIBLE_DEVICES. --random starts from random weights of Megatron-Core, so that no checkpoint is converted.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy

from ftgen import catalogue

HERE = Path(__file__).parent
STOCK = ["optimizations.preset=stock"]


def main() -> int:
    """Run, compare, print; 1 if a fast run strays."""
    options = _options()
    print(f"{'':32}{'loss':>12}{'grad norm':>12}{'weights':>12}")
    runs = {"stock": STOCK, "stock again": STOCK, "stock, one weight nudged": STOCK}
    runs |= {name: [*STOCK, *_on(name)] for name in _alone(options)} | {"all": []}
    with ThreadPoolExecutor(options.at_once) as pool:
        done = {}
        for (name, changes), gpu in zip(runs.items(), _gpus(), strict=False):
            done[name] = pool.submit(_record, name, changes, options, gpu)
        stock = done.pop("stock").result()
        apart = [_compare(name, stock, seen.result()) for name, seen in done.items()]
    noise, others = apart[:2], apart[2:]
    return int(max(others) > max(options.tolerance, 2 * max(noise)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", action="append", default=[], help="an optimization to turn on alone")
    parser.add_argument("--each", action="store_true", help="every optimization that the spec has on, alone")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--stage", type=Path, default=Path("bench-stage"))
    parser.add_argument("--at-once", type=int, default=1, help="how many train at the same time")
    parser.add_argument("--random", action="store_true", help="start from random weights of Megatron-Core")
    return parser.parse_args()


def _alone(options: argparse.Namespace) -> list[str]:
    """The optimizations that get a run of their own."""
    if not options.each:
        return list(options.only)
    command = [sys.executable, "-m", "ftgen", "plan", options.spec, "--set", f"gpu={options.gpu}", "--json"]
    plan = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [name for name, is_on in plan["optimizations"].items() if is_on]


def _on(name: str) -> list[str]:
    """What turns an optimization on, and the one that it cannot do without."""
    base = catalogue.optimizations()[name].builds_on
    return [f"optimizations.{which}=true" for which in (name, base) if which]


def _gpus() -> Iterator[str]:
    """The GPUs, again and again."""
    return itertools.cycle(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(","))


def _record(name: str, changes: list[str], options: argparse.Namespace, gpu: str) -> dict[str, Any]:
    """One training by bench/record.py, warmed up at once, so that the weights move."""
    out = options.stage.resolve() / "compare" / name.replace(",", "").replace(" ", "_")
    common = [f"gpu={options.gpu}", f"max_steps={options.steps}", "window.last_steps=1", "optimizer.warmup_steps=2"]
    sets = [word for change in [*common, *changes] for word in ("--set", change)]
    subprocess.run([sys.executable, "-m", "ftgen", "compile", options.spec, *sets, "--out", out], check=True, stdout=2)
    subprocess.run(["bash", out / f"{options.spec.stem}.sh", "--unpack", out], check=True)
    entrypoint = out / f"{options.spec.stem}.py"
    environment = os.environ | {"STAGE_PATH": str(options.stage.resolve()), "CUDA_VISIBLE_DEVICES": gpu}
    if options.deterministic:
        environment["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    python = os.environ.get("FTGEN_PYTHON", sys.executable)
    choices = [*(["--nudge"] if "nudged" in name else []), *(["--random"] if options.random else [])]
    training = [python, HERE / "record.py", entrypoint, out / "seen.npz", *choices]
    with (out / "log").open("w") as log:
        for command in (training,) if options.random else ([python, entrypoint, "convert"], training):
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
    return dict(numpy.load(out / "seen.npz"))


def _compare(title: str, stock: dict[str, Any], other: dict[str, Any]) -> float:
    """Print a row; how far the weights moved apart."""
    moved = stock["weights_after"] - stock["weights_before"]
    apart = numpy.linalg.norm(moved - (other["weights_after"] - other["weights_before"])) / numpy.linalg.norm(moved)
    loss = numpy.abs(stock["loss"] - other["loss"]).max()
    norm = (numpy.abs(stock["grad_norm"] - other["grad_norm"]) / stock["grad_norm"]).max()
    print(f"{title:32}{loss:12.2e}{norm:12.2e}{apart:12.2e}", flush=True)
    return float(apart)


if __name__ == "__main__":
    sys.exit(main())
