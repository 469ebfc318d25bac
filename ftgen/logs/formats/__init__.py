"""Log formats, one file each: a word that every step line has, and `parse(line) -> StepLine | StepTime | None`.

In: a line of bytes. Out: the step that it tells of; None for a line that is damaged. Start with `nemo.py`.
`nemo.py` also has `scan`, which reads many lines at once: logs of millions of steps need it.
"""

from ftgen.logs.formats import bridge, megatron, nemo, nemo_bar, nemo_untimed
from ftgen.logs.step import StepLine, StepTime

FORMATS = (nemo_bar, nemo, megatron, bridge, nemo_untimed)  # the word of nemo is a part of nemo_bar's


def words_in(text: bytes) -> list[bytes]:
    """The words by which step lines are found in this text; a text with NeMo's has no others."""
    if nemo.WORD in text:
        return [nemo.WORD]
    found = [word for word in (megatron.WORD, bridge.WORD) if word in text]
    return found or ([nemo_untimed.WORD] if nemo_untimed.WORD in text else [])


def parse(line: bytes) -> StepLine | StepTime | None:
    """What a step line says, in whatever format; None if it is damaged."""
    for format_ in FORMATS:
        if format_.WORD in line:
            found: StepLine | StepTime | None = format_.parse(line)
            return found
    return None
