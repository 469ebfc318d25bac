"""Many step lines at once. In: whole lines that are alike but for their digits. Out: a `Chunk`, and its steps when asked.

Reading a line takes microseconds, and a log may have millions of lines, of which a figure needs the last twenty. Lines
that are equal once their digits are taken out need no more than a look at their steps' numbers.
"""

import re
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

from ftgen.step_line import (
    MEGATRON,
    MEGATRON_KEYS,
    MOST,
    NEMO,
    NEMO_KEYS,
    Keys,
    Step,
    StepLine,
    cells_of,
    parse,
    steps_of,
)

VARYING = b"0123456789.e+- "  # what a number is written with, and what pads it
FEW = 4  # lines: fewer are not worth the trouble


class Shape(NamedTuple):
    """What lines that are alike have in common."""

    bare: bytes  # the line without VARYING
    time: bytes  # what stands before the step's time
    number: re.Pattern[bytes]  # its number, between what stands there
    keys: Keys
    counts: bool  # whether the first cell ends with iteration 7/99
    constant: tuple[bytes, ...]  # cells that must be in every line as they are in the first
    row: re.Pattern[bytes]  # a line, with the steps in all (or nothing) and then what is said in its cells
    said: tuple[str, ...]  # the names of that


class Chunk(NamedTuple):
    """Consecutive steps, a line each."""

    first: int
    last: int
    text: bytes  # the lines; empty where they are to be read again from the file

    def step_lines(self, start: int, stop: int) -> list[StepLine]:
        """The steps from `start` to before `stop`, read."""
        after = self.last + 1 - start
        tail = self.text.rsplit(b"\n", after + 1)[-after - 1 :]  # behind the last newline there is nothing
        lines = [line + b"\n" for line in tail[: stop - start]]
        steps = _read_alike(lines)
        if steps is None:
            return [line for line in map(parse, lines) if line]
        return [StepLine(number, step) for number, step in enumerate(steps, start)]


def _read_alike(lines: list[bytes]) -> list[Step] | None:
    """Lines of one shape, read together; None where one of them says something that is no plain number."""
    shape = shape_of(lines[0]) if lines else None
    if not shape:
        return None
    columns = list(zip(*shape.row.findall(b"".join(lines)), strict=True))
    if not columns or len(columns[0]) != len(lines):
        return None
    try:
        said = {name: _numbers(column) for name, column in zip(shape.said, columns[1:], strict=True)}
    except ValueError:
        return None
    if not all(-MOST < max(column) < MOST for column in said.values()):
        return None
    counts = _numbers(columns[0]) if shape.counts else []
    return steps_of(said, shape.keys, [int(count) + 1 - shape.keys.first for count in counts], len(lines))


def _numbers(column: Sequence[bytes]) -> list[float]:
    """The number in each cell; ValueError where there is none."""
    if column[0] == column[-1] and len(set(column)) == 1:
        return [float(column[0])] * len(column)
    return list(map(float, column))


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
    numbers = shape.number.findall(text)
    if len(numbers) != count or any(text.count(cell) != count for cell in (shape.time, *shape.constant)):
        return None
    first = int(numbers[0])
    if first < shape.keys.first or b" ".join(numbers) != b" ".join([b"%d"] * count) % tuple(range(first, first + count)):
        return None
    return Chunk(first - shape.keys.first, first - shape.keys.first + count - 1, text)


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
    counts = read.step.planned is not None
    time = b"| %s: " % keys.names["time"][0]
    cells = sorted(cells_of(line, keys), key=itemgetter(1))
    row = _row(line.count(b"|"), {place: before for _, place, before in cells}, counts=counts)
    if time not in line or len({place for _, place, _ in cells}) != len(cells):
        return None
    number = re.compile(re.escape(before) + rb"(\d{1,9})" + re.escape(after))
    return Shape(key, time, number, keys, counts, constant, row, tuple(name for name, _, _ in cells))


def _row(bars: int, before: Mapping[int, bytes], *, counts: bool) -> re.Pattern[bytes]:
    """What a line is like that has numbers in those cells, behind what stands before them."""
    # a word to begin with is found fastest; what must not stand before it is asked behind it
    first = rb"iteration(?<!\witeration) +\d{1,9}/ *(\d{1,9})[^|\n\w]*" if counts else rb"(?m)^()[^|\n]*"
    cells = [re.escape(before[place]) + rb"([-+.\de ]*)" if place in before else rb"[^|\n]*" for place in range(1, bars + 1)]
    return re.compile(rb"\|".join((first, *cells)) + rb"\n")
