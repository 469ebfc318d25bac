"""Many step lines at once. In: whole lines that are alike but for their digits. Out: a `Chunk`, and its steps when asked.

Reading a line takes microseconds, and a log may have millions of lines, of which a figure needs the last twenty. Lines
that are equal once their digits are taken out need no more than a look at their steps' numbers.
"""

from typing import NamedTuple

from ftgen.step_line import (
    ITERATION,
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
MOST_STEPS = 10**9
FEW = 4  # lines: fewer are not worth the trouble


class Shape(NamedTuple):
    """What lines that are alike have in common."""

    bare: bytes  # the line without VARYING
    time: bytes  # what stands before the step's time
    before: bytes  # what stands before its number
    after: bytes  # and after it
    keys: Keys
    counts: bool  # whether the first cell ends with iteration 7/99
    constant: tuple[bytes, ...]  # cells that must be in every line as they are in the first
    cells: tuple[tuple[str, int, bytes], ...]  # what is said in which cell, and what stands before it there


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
    """Lines of one shape, read cell by cell; None where one of them says something that is no plain number."""
    shape = shape_of(lines[0]) if lines else None
    if not shape:
        return None
    rows = [line.split(b"|") for line in lines]
    said = {}
    try:
        for name, place, before in shape.cells:
            column = _numbers([row[place] for row in rows], before)
            if column is None or not -MOST < max(column) < MOST:
                return None
            said[name] = column
        counts = [_count(row[0]) for row in rows] if shape.counts else []
    except ValueError:
        return None
    return steps_of(said, shape.keys, [count + 1 - shape.keys.first for count in counts], len(rows))


def _count(cell: bytes) -> int:
    """The 99 in iteration 7/99; ValueError."""
    match = ITERATION.search(cell.rstrip())
    if not match:
        raise ValueError
    return int(match[2])


def _numbers(cells: list[bytes], before: bytes) -> list[float] | None:
    """The number in each cell, behind `before`; ValueError where there is none, None where something else is before it."""
    if len(set(cells)) == 1:
        return [float(cells[0][len(before) :])] * len(cells) if cells[0].startswith(before) else None
    skip = len(before)
    if {cell[:skip] for cell in cells} != {before}:
        return None
    return [float(cell[skip:]) for cell in cells]


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
    if len(parts) != count + 1 or any(text.count(cell) != count for cell in (shape.time, *shape.constant)):
        return None
    del parts[0]
    try:
        first = int(parts[0][: parts[0].index(shape.after)])
    except ValueError:
        return None
    if not shape.keys.first <= first < MOST_STEPS or not _follow(parts, first, shape.after):
        return None
    return Chunk(first - shape.keys.first, first - shape.keys.first + count - 1, text)


def _follow(parts: list[bytes], first: int, after: bytes) -> bool:
    """Whether the parts begin with numbers that follow one another from `first` on, each before `after`."""
    while parts:
        digits = len(b"%d" % first)
        some = parts[: 10**digits - first]  # as many as have so many digits
        expected = (b"%d" + after) * len(some) % tuple(range(first, first + len(some)))
        width = digits + len(after)
        if b"".join([part[:width] for part in some]) != expected:
            return False
        first += len(some)
        parts = parts[len(some) :]
    return True


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
    return Shape(key, time, before, after, keys, counts, constant, cells_of(line, keys)) if time in line else None
