"""Estimates the size of a training's checkpoint, and how long it takes to write.

In: a number of trained weights (`int`), a `Plan`. Out: bytes (`int`), seconds (`int`), rows of text. Pure.

A checkpoint has the trained weights and the state of Adam. With LoRA, the trained weights are the adapters.
"""

from ftgen.plan.plan import Plan
from ftgen.units import format_bytes

# Bytes of one trained weight: BF16, and float32 for the master weight and Adam's two moments. The distributed optimizer
# shares this state between GPUs; the checkpoint has all of it once.
MIXED = 2 + 3 * 4
FP32 = 3 * 4  # on a CPU the weights themselves are float32
# Speeds of writing, assumed: a shared file system under load, and a parallel file system with many servers. They only show
# the order of magnitude. The log of a run has the measured times.
SLOW, FAST = 1e9, 20e9  # bytes per second


def size(trained_weights: int, precision: str) -> int:
    """Estimated bytes of one checkpoint."""
    return trained_weights * (FP32 if precision == "fp32" else MIXED)


def slow_save_s(checkpoint_bytes: int) -> int:
    """Whole seconds to write a checkpoint to a slow file system."""
    return -int(-checkpoint_bytes // SLOW)


def describe(plan: Plan) -> list[tuple[str, str]]:
    """How often the training is saved, the size of the checkpoints, and how long one takes: (label, text); else empty."""
    save = plan.save
    if not save:
        return []
    one, per_weight = save.checkpoint_bytes, FP32 if plan.precision == "fp32" else MIXED
    return [
        ("saved", f"every {save.every_steps} steps, at the end and before the time limit; the last {save.keep} are kept"),
        ("size", f"{format_bytes(one)} each: {per_weight} bytes x {one // per_weight:,} trained weights"),
        ("disk", f"{format_bytes(one * (save.keep + 1))} for {save.keep} + 1 checkpoints"),
        ("time", f"{one / SLOW:.2g} s each at {SLOW / 1e9:g} GB/s, {one / FAST:.2g} s at {FAST / 1e9:g} GB/s (assumed)"),
    ]
