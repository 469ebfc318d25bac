"""Does the fast run learn what the stock recipe learns? In: a spec. Out: a table of differences, next to the noise.

    python bench/compare.py bench/specs/sft_fp8_slice.toml --gpu h200 [--steps 24] [--only cuda_graphs] [--stage DIR]

Trains with the stock recipe twice, which shows the noise, and with the spec's optimizations, or with --only one of them,
from the same weights, data and seed. For each pair: the largest difference of loss and grad norm, and how far the trained
weights moved apart, as a fraction of how far they moved (sampled; float32). Exit 1 where they moved apart by more than
--tolerance.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy

HERE = Path(__file__).parent


def main() -> int:
    """Run, compare, print; 1 if the fast run strays."""
    options = _options()
    fast = [f"optimizations.{name}=true" for name in options.only]
    stock = ["optimizations.preset=stock"]
    runs = {"stock": stock, "stock again": stock, "fast": stock + fast if fast else []}
    seen = {name: _record(name.replace(" ", "_"), changes, options) for name, changes in runs.items()}
    print(f"{'':24}{'loss':>12}{'grad norm':>12}{'weights':>12}")
    worst = [_compare(f"stock and {name}", seen["stock"], seen[name]) for name in ("stock again", "fast")]
    return int(worst[1] > options.tolerance)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", action="append", default=[], help="an optimization to turn on alone")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--stage", type=Path, default=Path("bench-stage"))
    return parser.parse_args()


def _record(name: str, changes: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One training by bench/record.py, warmed up at once, so that the weights move."""
    out = options.stage.resolve() / "compare" / name
    common = [f"gpu={options.gpu}", f"max_steps={options.steps}", "window.last_steps=1", "optimizer.warmup_steps=2"]
    sets = [word for change in [*common, *changes] for word in ("--set", change)]
    subprocess.run([sys.executable, "-m", "ftgen", "compile", options.spec, *sets, "--out", out], check=True, stdout=2)
    subprocess.run(["bash", out / f"{options.spec.stem}.sh", "--unpack", out], check=True)
    entrypoint = out / f"{options.spec.stem}.py"
    environment = os.environ | {"STAGE_PATH": str(options.stage.resolve()), "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    python = os.environ.get("FTGEN_PYTHON", sys.executable)
    with (out / "log").open("w") as log:
        for command in ([python, entrypoint, "convert"], [python, HERE / "record.py", entrypoint, out / "seen.npz"]):
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
    return dict(numpy.load(out / "seen.npz"))


def _compare(title: str, one: dict[str, Any], other: dict[str, Any]) -> float:
    """Print a row; how far the weights moved apart."""
    moved = one["weights_after"] - one["weights_before"]
    apart = numpy.linalg.norm(moved - (other["weights_after"] - other["weights_before"])) / numpy.linalg.norm(moved)
    loss = numpy.abs(one["loss"] - other["loss"]).max()
    norm = (numpy.abs(one["grad_norm"] - other["grad_norm"]) / one["grad_norm"]).max()
    print(f"{title:24}{loss:12.2e}{norm:12.2e}{apart:12.2e}", flush=True)
    return float(apart)


if __name__ == "__main__":
    sys.exit(main())
