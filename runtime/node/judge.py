"""Judge what was found of a node's GPUs. In: facts, and what the catalogue expects of the GPU. Out: a line for each problem.

The thresholds are fractions that healthy GPUs keep away from. docs/how-to/node-check.md says where each comes from.
"""

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GEMM = 0.75  # of the measured rate of the same GPU
GEMM_OF_PEAK = 0.5  # of the dense peak, for a GPU whose rate nobody has measured for the catalogue; an H200 reaches 0.74
COPY = 0.6  # of the published memory bandwidth
NEIGHBOURS = {"gemm_tflops": 0.9, "copy_gb_per_s": 0.9, "host_gb_per_s": 0.6}  # of the median of the node's GPUs
ALL_REDUCE = 0.25  # of NVLink's bandwidth; over PCIe it would be less
CLOCK = 0.6  # of the highest clock, while a GEMM runs at the power limit
USED = 0.05  # of the memory, before the training has any
# Bits of clocks_event_reasons.active, from nvml.h. A power cap (0x4) is normal under a GEMM.
THROTTLED = {0x8: "hardware slowdown", 0x20: "thermal slowdown", 0x40: "thermal slowdown by hardware", 0x80: "power brake"}
BROKEN = re.compile(r"requires reset|Unknown Error|lost", re.IGNORECASE)

Facts = Mapping[str, Any]
Expected = Mapping[str, Any]


def problems(gpus: Sequence[Facts], wanted: int, expected: Expected) -> list[str]:
    """Everything that is wrong with the GPUs of a node. Each has the fields of smi.py and the figures of measure.py."""
    found = [] if len(gpus) >= wanted else [f"{len(gpus)} GPUs, the plan needs {wanted}"]
    for number, gpu in enumerate(gpus):
        found += [f"GPU {gpu.get('index') or number}: {what}" for what in _of_one(gpu, expected, alone=len(gpus) == 1)]
    return [*found, *_beside_each_other(gpus)]


def of_all_reduce(gb_per_s: float | None, expected: Expected) -> Iterator[str]:
    """An all-reduce inside the node that does not use NVLink."""
    nvlink = expected.get("nvlink_gb_per_s")
    if gb_per_s is not None and nvlink and gb_per_s < ALL_REDUCE * nvlink:
        yield f"the all-reduce inside the node reaches {gb_per_s:.0f} GB/s, NVLink has {nvlink:g} GB/s"


def _of_one(gpu: Facts, expected: Expected, *, alone: bool) -> Iterator[str]:
    yield from (f"{field} is {value}" for field, value in gpu.items() if isinstance(value, str) and BROKEN.search(value))
    word, name = expected.get("driver_name"), gpu.get("name")
    if word and name and word not in str(name).split():
        yield f"is a {name}, the plan is for {word}"
    yield from _memory(gpu)
    yield from _clocks(gpu)
    yield from _links(gpu, expected, alone=alone)
    yield from _speed(gpu, expected)


def _memory(gpu: Facts) -> Iterator[str]:
    if errors := _number(gpu, "ecc.errors.uncorrected.volatile.total"):
        yield f"{errors:.0f} uncorrected ECC errors since the driver was loaded"
    if gpu.get("ecc.mode.current") == "Disabled":
        yield "ECC is off"
    if _is_yes(gpu.get("remapped_rows.pending")):
        yield "memory rows wait to be replaced: the GPU must be reset"
    if _is_yes(gpu.get("remapped_rows.failure")):
        yield "memory rows could not be replaced"
    total, used = _number(gpu, "memory.total"), _number(gpu, "memory.used")
    if total and used is not None and used > USED * total:
        yield f"{used / 1024:.1f} GiB of its memory are in use by somebody else"


def _clocks(gpu: Facts) -> Iterator[str]:
    mask = re.fullmatch("0x([0-9a-fA-F]{1,16})", str(gpu.get("clocks_event_reasons.active")))
    reasons = [reason for bit, reason in THROTTLED.items() if mask and int(mask[1], 16) & bit]
    clock, highest = _number(gpu, "clocks.sm"), _number(gpu, "clocks.max.sm")
    if reasons:
        yield f"its clock is held back: {', '.join(reasons)}{_at(gpu)}"
    elif clock and highest and "gemm_tflops" in gpu and clock < CLOCK * highest:
        yield f"its clock is {clock:.0f} of {highest:.0f} MHz under load{_at(gpu)}"


def _at(gpu: Facts) -> str:
    temperature = _number(gpu, "temperature.gpu")
    return "" if temperature is None else f" at {temperature:.0f} °C"


def _links(gpu: Facts, expected: Expected, *, alone: bool) -> Iterator[str]:
    for what, field in (("width", "pcie.link.width"), ("generation", "pcie.link.gen")):
        now, most = _number(gpu, f"{field}.current"), _number(gpu, f"{field}.max")
        if now and most and now < most:
            yield f"its PCIe link has {what} {now:.0f}, it can have {most:.0f}"
    links = gpu.get("nvlinks")
    if links is None or alone:  # a GPU alone in a virtual machine has none to talk to
        return
    active = [speed for speed in links if speed]
    wanted = max(int(expected.get("nvlinks", 0)), len(links))
    if len(active) < wanted:
        yield f"{len(active)} of {wanted} NVLinks are active"
    elif active and min(active) < 0.95 * max(active):
        yield f"an NVLink has {min(active):g} GB/s, another {max(active):g} GB/s"


def _speed(gpu: Facts, expected: Expected) -> Iterator[str]:
    gemm, measured, peak = gpu.get("gemm_tflops"), expected.get("gemm_tflops"), expected.get("peak_bf16_tflops")
    if gemm and measured and gemm < GEMM * measured:
        yield f"a GEMM reaches {gemm:.0f} TFLOP/s, this GPU was measured at {measured:g}"
    elif gemm and peak and not measured and gemm < GEMM_OF_PEAK * peak:
        yield f"a GEMM reaches {gemm:.0f} TFLOP/s, the peak is {peak:g}"
    copy, memory = gpu.get("copy_gb_per_s"), expected.get("memory_gb_per_s")
    if copy and memory and copy < COPY * memory:
        yield f"a copy reaches {copy:.0f} GB/s, its memory has {memory:g} GB/s"


def _beside_each_other(gpus: Sequence[Facts]) -> Iterator[str]:
    """GPUs that are much slower than the others of the node."""
    for figure, least in NEIGHBOURS.items():
        known = [(number, gpu[figure]) for number, gpu in enumerate(gpus) if gpu.get(figure)]
        middle = statistics.median(value for _, value in known) if len(known) > 2 else None
        for number, value in known:
            if middle and value < least * middle:
                index = gpus[number].get("index") or number
                yield f"GPU {index}: {figure} is {value:.0f}, that of the node's other GPUs {middle:.0f}"


def _number(gpu: Facts, field: str) -> float | None:
    try:
        return float(str(gpu.get(field)))
    except ValueError:
        return None


def _is_yes(value: Any) -> bool:
    return value is not None and str(value).lower() not in {"no", "0"}
