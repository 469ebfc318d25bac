"""NeMo's step lines without a time, as NeMo writes them without its timing callback.

In: one line of bytes. Out: a `StepLine` without a time, or None for a damaged line.
"""

from ftgen.logs.formats import nemo
from ftgen.logs.step import StepLine

WORD = b"| reduced_train_loss: "


def parse(line: bytes) -> StepLine | None:
    """What the line says; None for a line that counts no iteration or has no end: its time may come."""
    if not line.endswith(b"\n"):
        return None
    fields = nemo.fields_of(line)
    return nemo.step_line(fields) if b"iteration" in fields and nemo.NUMBER in fields else None
