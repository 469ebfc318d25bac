"""Megatron-Bridge's second line of a step: `Step Time : 9.09s GPU utilization: 663.5MODEL_TFLOP/s/GPU`.

In: one line of bytes. Out: a `StepTime`, or None for a damaged line. The first line of a step is Megatron's.
"""

import re

from ftgen.logs.step import StepTime

WORD = b"MODEL_TFLOP/s/GPU"
LINE = re.compile(rb"Step Time : (\d{1,9}(?:\.\d{1,9})?)s +GPU utilization: (\d{1,9}(?:\.\d{1,9})?)MODEL_TFLOP/s/GPU")


def parse(line: bytes) -> StepTime | None:
    """What the line says of a step's time."""
    match = LINE.search(line)
    return StepTime(float(match[1]), float(match[2])) if match else None


MEMORY = b"mem-max-reserved-gigabytes: "


def peak_memory(text: bytes) -> float | None:
    """The highest peak memory that the text tells of, in bytes: Megatron-Bridge writes it once a rank, in 10^9 bytes."""
    found = re.findall(rb"mem-max-reserved-gigabytes: (\d{1,6}(?:\.\d{1,9})?)", text)
    return max(map(float, found)) * 1e9 if found else None
