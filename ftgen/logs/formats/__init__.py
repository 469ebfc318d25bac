"""Log formats, one file each: a word that every step line has, and `parse(line) -> StepLine | StepTime | None`.

In: a line of bytes. Out: the step that it tells of; None for a line that is damaged. Start with `nemo.py`.
`nemo.py` also has `scan`, which reads many lines at once: logs of millions of steps need it.
"""

from collections.abc import Callable

from ftgen.logs.formats import bridge, megatron, nemo, nemo_bar
from ftgen.logs.step import StepLine, StepTime

PARSERS: dict[bytes, Callable[[bytes], StepLine | StepTime | None]] = {
    nemo_bar.WORD: nemo_bar.parse,  # nemo's is a part of it
    nemo.WORD: nemo.parse,
    megatron.WORD: megatron.parse,
    bridge.WORD: bridge.parse,
    nemo.UNTIMED: nemo.parse_untimed,
}


def words_in(text: bytes) -> list[bytes]:
    """The words by which step lines are found in this text; a text with NeMo's has no others."""
    if nemo.WORD in text:
        return [nemo.WORD]
    found = [word for word in (megatron.WORD, bridge.WORD) if word in text]
    return found or ([nemo.UNTIMED] if nemo.UNTIMED in text else [])


def parse(line: bytes) -> StepLine | StepTime | None:
    """What a step line says, in whatever format; None if it is damaged."""
    return next((parser(line) for word, parser in PARSERS.items() if word in line), None)
