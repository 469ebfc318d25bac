"""NeMo's progress bar: `Epoch 0: : 8%|█ | 8/100 [00:21<04:07, reduced_train_loss=12.81, train_step_timing in s=2.690]`.

In: one line of bytes. Out: a `StepLine`, or None for a damaged line.
"""

import re

from ftgen.logs.formats import nemo
from ftgen.logs.step import StepLine, is_time, step_line

WORD = nemo.WORD + b"="
BAR = re.compile(rb"(?:\| *(\d{1,9})/(\d{1,9}) )?\[[^\[\]\n]*?, ([^\[\]\n]*)\]")
EPOCH = re.compile(rb"Epoch (\d{1,6})")
ROUNDED = 0.01  # the bar rounds a number to three or four digits


def parse(line: bytes) -> StepLine | None:
    """What the bar says; None if it is not whole."""
    match = BAR.search(line)
    if not match or line.count(nemo.WORD) != 1:
        return None
    fields = dict(part.strip().partition(b"=")[::2] for part in match[3].split(b", "))
    if not is_time(fields.get(nemo.WORD)):
        return None
    if b"e+" in fields.get(b"consumed_samples", b""):
        del fields[b"consumed_samples"]  # rounded: 7.4e+4
    epoch = EPOCH.search(line)
    counter = int(match[1]) if match[1] else None
    before = int(epoch[1]) * int(match[2]) if epoch and match[2] else 0
    number_, accumulates = _number(nemo.step_number(fields), None if counter is None else before + counter - 1)
    planned = int(match[2]) if match[2] and not accumulates and not before else None
    read = step_line(number_, fields, nemo.KEYS, planned=planned)
    return read._replace(bar=True, counter=counter if accumulates else None)


def _number(printed: int | None, counted: int | None) -> tuple[int | None, bool]:
    """The step's number, and whether several bars tell of one step: gradient accumulation.

    The bar's counter is exact. The printed number is rounded from 1000 on, and one too high after a validation.
    """
    if printed is None or counted is None:
        return counted if printed is None else printed, False
    if printed == counted + 1 or (printed >= 1000 and abs(printed - counted) <= ROUNDED * printed):
        return counted, False
    return printed, printed < counted
