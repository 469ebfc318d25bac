"""Many step lines at once. In: whole lines that are alike but for their digits. Out: a `Chunk`, and its steps when asked.

Reading a line takes microseconds, and a log may have millions of lines, of which a figure needs the last twenty. Lines
that are equal once their digits are taken out need no more than a look at their steps' numbers.
"""

from typing import NamedTuple

from ftgen.step_line import MEGATRON, MEGATRON_KEYS, NEMO, NEMO_KEYS, StepLine, parse

VARYING = b"0123456789.e+- "  # what a number is written with, and what pads it
FEW = 4  # lines: fewer are not worth the trouble


class Shape(NamedTuple):
    """What lines that are alike have in common."""

    bare: bytes  # the line without VARYING
    before: bytes  # what stands before the step's number
    after: bytes  # and after it
    first: int  # the number of the first iteration
    constant: tuple[bytes, ...]  # cells that must be in every line as they are in the first


class Chunk(NamedTuple):
    """Consecutive steps, a line each."""

    first: int
    last: int
    text: bytes  # the lines; empty where they are to be read again from the file

    def lines(self, start: int, stop: int) -> list[bytes]:
        """The lines of the steps from `start` to before `stop`."""
        after = self.last + 1 - start
        tail = self.text.rsplit(b"\n", after + 1)[-after - 1 :]  # behind the last newline there is nothing
        return [line + b"\n" for line in tail[: stop - start]]

    def step_lines(self, start: int, stop: int) -> list[StepLine]:
        """The steps from `start` to before `stop`, read."""
        return [line for line in map(parse, self.lines(start, stop)) if line]


_shapes: dict[bytes, Shape | None] = {}  # by bare line


def bare(text: bytes) -> bytes:
    """The text without whatever varies from one step line to the next."""
    return text.translate(None, VARYING)


def shape_of(line: bytes) -> Shape | None:
    """What a line has in common with those like it; None where such lines must be read one by one."""
    key = bare(line)
    if key not in _shapes:
        if len(_shapes) > 1000:  # lines that are never alike
            _shapes.clear()
        _shapes[key] = _shape(line, key)
    return _shapes[key]


def chunk_of(text: bytes, count: int, shape: Shape) -> Chunk | None:
    """The `count` lines of that shape as a chunk; None if their steps do not follow one another."""
    parts = text.split(shape.before)
    if len(parts) != count + 1 or any(text.count(cell) != count for cell in shape.constant):
        return None
    del parts[0]
    try:
        first = int(parts[0][: parts[0].index(shape.after)])
    except ValueError:
        return None
    expected = map((b"%d" + shape.after).__mod__, range(first, first + count))
    if first < shape.first or not all(map(bytes.startswith, parts, expected)):
        return None
    return Chunk(first - shape.first, first - shape.first + count - 1, text)


def _shape(line: bytes, key: bytes) -> Shape | None:
    read = parse(line)
    if read is None or read.number is None or read.invalid or read.bar or line.count(NEMO) + line.count(MEGATRON) != 1:
        return None
    keys = NEMO_KEYS if NEMO in line else MEGATRON_KEYS
    before, after = b" iteration ", b"/"
    if keys.number and b"| %s: " % keys.number in line:
        before, after = b"| %s: " % keys.number, b" |"
    if line.count(before) != 1 or after not in line.partition(before)[2]:
        return None
    constant = tuple(cell for cell in line.split(b"|") if any(name + b":" in cell for name in keys.spoiled))
    return Shape(key, before, after, keys.first, constant)
