"""Step lines of Megatron-LM and Megatron-Bridge: `iteration 8/ 100 | elapsed time per iteration (ms): 2693.0 | … |`.

In: one line of bytes. Out: a `StepLine`, or None for a damaged line.
"""

import re

from ftgen.logs.formats.nemo import fields_of
from ftgen.logs.step import Keys, StepLine, is_time, number, step_line

WORD = b"elapsed time per iteration ("
MILLISECONDS, SECONDS = WORD + b"ms)", WORD + b"s)"
KEYS: Keys = {
    "time_s": (MILLISECONDS, SECONDS),
    "loss": (b"lm loss", b"lm loss value", b"loss", b"total loss"),
    "grad_norm": (b"grad norm",),
    "tflops_per_gpu": (b"throughput per GPU (TFLOP/s/GPU)",),
    "global_batch_size": (b"global batch size",),
    "consumed_samples": (b"consumed samples",),
}
SKIPPED, NAN = b"number of skipped iterations", b"number of nan iterations"
WITHOUT_COLON = re.compile(rb"(.*\D) +([-+\d.eE]+)")  # `lm loss 7.399415E+00`, in old versions


def parse(line: bytes) -> StepLine | None:
    """What a step line says; None if it is not as Megatron wrote it. Megatron counts iterations from 1.

    Megatron leaves out a loss that is NaN, and the loss of steps that fp16 skipped: the log as a whole tells which.
    """
    fields = fields_of(line)
    for key in [key for key, value in fields.items() if not value]:
        if match := WITHOUT_COLON.fullmatch(key):
            fields[match[1].strip()] = match[2]
    unit = SECONDS if SECONDS in fields else MILLISECONDS
    if not is_time(fields.get(unit, b"none").partition(b"/")[0]):
        return None
    last, iteration = fields.get(b"last iteration"), fields.get(b"iteration")
    number_ = max(int(iteration) - 1, 0) if iteration else None
    second = 1.0 if unit == SECONDS else 1000.0
    others = [key for key in fields if key.endswith((b" loss", b"_loss"))]  # such as mtp_1 loss
    read = step_line(number_, fields, KEYS, planned=int(last) if last else None, second=second, others=others)
    skipped = bool(number(fields.get(SKIPPED)))
    scales = number(fields.get(b"loss scale")) not in {None, 1.0}  # fp16's loss scale, which settles in the first steps
    invalid = read.invalid
    for key in (NAN,) if scales else (SKIPPED, NAN):
        if not invalid and number(fields.get(key)):
            invalid = f"{key.decode()} is {fields[key].strip().decode()}"
    left_out = read.step.loss is None and not skipped
    return read._replace(invalid=invalid, skipped=skipped and scales, left_out=left_out)
