"""Step lines of Megatron-LM and Megatron-Bridge: `iteration 8/ 100 | elapsed time per iteration (ms): 2693.0 | … |`.

In: one line of bytes. Out: a `StepLine`, or None for a damaged line.
"""

from ftgen.logs.formats.nemo import fields_of
from ftgen.logs.step import Keys, StepLine, can_be_time, not_finite, number, step_from

WORD = b"elapsed time per iteration (ms)"
KEYS: Keys = {
    "time_s": (WORD,),
    "loss": (b"lm loss",),
    "grad_norm": (b"grad norm",),
    "tflops_per_gpu": (b"throughput per GPU (TFLOP/s/GPU)",),
    "global_batch_size": (b"global batch size",),
    "consumed_samples": (b"consumed samples",),
}
SPOILED = (b"number of skipped iterations", b"number of nan iterations")  # counts of what must not happen


def parse(line: bytes) -> StepLine | None:
    """What a step line says; None if it is not as Megatron wrote it. Megatron counts iterations from 1."""
    fields = fields_of(line)
    if not can_be_time(fields.get(WORD, b"none")):
        return None
    last, iteration = fields.get(b"last iteration"), fields.get(b"iteration")
    step = step_from(fields, KEYS, second=1000.0, planned=int(last) if last else None)
    return StepLine(max(int(iteration) - 1, 0) if iteration else None, step, _invalid(fields))


def _invalid(fields: dict[bytes, bytes]) -> str | None:
    if found := not_finite(fields, (*KEYS["loss"], *KEYS["grad_norm"])):
        return found
    for key in SPOILED:
        if number(fields.get(key)):
            return f"{key.decode()} is {fields[key].strip().decode()}"
    return None if b"lm loss" in fields else "lm loss is left out, as Megatron does with NaN,"
