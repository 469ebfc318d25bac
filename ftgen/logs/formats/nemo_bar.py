"""NeMo's progress bar: `Epoch 0: : 8%|█ | 8/100 [00:21<04:07, reduced_train_loss=12.81, train_step_timing in s=2.690]`.

In: one line of bytes. Out: a `StepLine`, or None for a damaged line.
"""

import re

from ftgen.logs.formats import nemo
from ftgen.logs.step import StepLine, can_be_time, not_finite, number, step_from

WORD = nemo.WORD + b"="
BAR = re.compile(rb"(?:\| *(\d{1,9})/(\d{1,9}) )?\[[^\[\]\n]*?, ([^\[\]\n]*)\]")


def parse(line: bytes) -> StepLine | None:
    """What the bar says; None if it is not whole."""
    match = BAR.search(line)
    if not match or line.count(nemo.WORD) != 1:
        return None
    fields = dict(part.partition(b"=")[::2] for part in match[3].split(b", "))
    if not can_be_time(fields.get(nemo.WORD, b"none")):
        return None
    step = step_from(fields, nemo.KEYS, planned=int(match[2]) if match[2] else None)
    invalid = not_finite(fields, (*nemo.KEYS["loss"], *nemo.KEYS["grad_norm"]))
    return StepLine(_step_number(fields, match[1]), step, invalid, bar=True)


def _step_number(fields: dict[bytes, bytes], count: bytes | None) -> int | None:
    """The step as printed; else what the bar counts, less one."""
    printed = number(fields.get(nemo.NUMBER))
    if printed is not None and 0 <= printed < 1e9 and printed.is_integer():
        return int(printed)
    return max(int(count) - 1, 0) if count else None
