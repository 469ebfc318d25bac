"""Many step lines at once. In: whole lines that are alike but for their digits. Out: a `Chunk`, and its steps when asked.

Reading a line takes microseconds, and a log may have millions of lines, of which a figure needs the last twenty. Lines
that are equal once their digits are taken out need no more than a look at their steps' numbers.
"""

import re
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from ftgen.logs.span import Column, Span
from ftgen.logs.step_line import (
    BRIDGE,
    MEGATRON,
    MEGATRON_KEYS,
    NEMO,
    NEMO_KEYS,
    Keys,
    cells_of,
    columns_of,
    is_damaged,
    number,
    parse,
)

DIGITS = b"0123456789."
VARYING = b"0123456789.+- "  # what a number is written with, and what pads it; exponents' e apart
LATER = ("loss", "grad_norm")  # which no figure needs
OFTEN = ("consumed_samples",)  # what the same steps of many runs say alike
FEW = 4  # lines: fewer are not worth the trouble
LONGER = 24  # bytes by which numbers between two others may grow; where they grow more, lines are read one by one
PLANNED = re.compile(rb"iteration(?<!\witeration) +\d{1,9}/ *(\d{1,9}) *\|")  # a word to begin with is found fastest
DIGITS_TO_0 = bytes.maketrans(b"123456789E", b"000000000e")
NUMBERS, PADDED = (tuple(form % number for number in range(1000)) for form in (b"%d ", b"%03d "))


class Shape(NamedTuple):
    """What lines that are alike have in common."""

    bare: bytes  # the line without VARYING
    number: re.Pattern[bytes]  # of a line with a time its number, with what is passed over up to the next one
    keys: Keys
    counts: bool  # whether the first cell ends with iteration 7/99
    constant: tuple[bytes, ...]  # cells that must be in every line as they are in the first
    exponents: bool  # whether a loss or a gradient norm has one
    cells: int  # of a line
    said: tuple[tuple[str, int, bytes], ...]  # in which cell, from 0, and behind what; the first counts that does not say 0


class Chunk(NamedTuple):
    """Consecutive steps, a line each."""

    first: int
    last: int
    text: bytes  # the lines; empty where they are to be read again from the file
    alike: bool = True  # the lines, all of them

    def steps(self, start: int, stop: int) -> Span:
        """The steps from `start` to before `stop`, read."""
        after = self.last + 1 - start
        span = _read_alike(self.text, after, range(start, min(stop, self.last + 1)), checked=self.alike)
        if span is None:
            lines = self.text.rsplit(b"\n", after + 1)[-after - 1 : -1]  # behind the last newline there is nothing
            read = (parse(line + b"\n") for line in lines[: stop - start])
            span = Span.of({line.number: line.step for line in read if line and line.number is not None})
        return span


def _read_alike(text: bytes, after: int, numbers: range, *, checked: bool) -> Span | None:
    """The steps of so many lines from the one on which `after` ends the text, read together.

    None where the lines are not of one shape, or one of them says something that is no plain number.
    """
    first = text[: text.find(b"\n") + 1]
    shape = shape_of(first)
    if not shape or not (checked or barest(text) == barest(first) * text.count(b"\n")):
        return None
    width = after * shape.cells
    end = text[-after * (len(first) + LONGER) :]
    cells = _last_cells(end, width)
    if len(cells) < width + 2 and len(end) < len(text):  # its first cell may not be whole
        cells = _last_cells(text, width)
    start = len(cells) - width - 1
    return _span(shape, cells[start : start + len(numbers) * shape.cells], numbers) if start >= 0 else None


def _last_cells(text: bytes, count: int) -> list[bytes]:
    """So many cells, between whatever is before them and nothing."""
    return text.replace(b"\n", b"|").rsplit(b"|", count + 1)


def _span(shape: Shape, cells: Sequence[bytes], numbers: range) -> Span | None:
    """The steps whose cells these are, all that the lines have; None where one is no plain number."""
    said: dict[str, Sequence[float]] = {}
    columns: dict[str, Column] = {}
    try:
        for name, place, before in shape.said:
            column = cells[place :: shape.cells]
            if name in LATER:
                columns[name] = partial(_what_numbers, column, before)
            elif not said.get(name, (0.0,))[0]:
                said[name] = _numbers(column, before, often=name in OFTEN)
    except ValueError:
        return None
    if "time_s" not in said:
        return None
    columns |= columns_of(said, shape.keys)
    if shape.counts:
        first = shape.keys.first
        planned = _planned(b"|".join((*cells[:: shape.cells], b"")), numbers.start + first, numbers.stop + first, first)
        if not planned:
            return None
        columns["planned"] = planned
    return Span(numbers, columns)


@lru_cache(maxsize=100)  # the same steps of many runs are counted alike
def _planned(text: bytes, start: int, stop: int, first: int) -> Sequence[int | None]:
    """How many steps cells say there will be, each before a |, numbered from `first`; nothing if one does not say so.

    Once for all, where they count from `start` to before `stop` of the same number.
    """
    number = b"%d" % start
    before, _, after = text[: text.find(b"|")].rpartition(number + b"/")
    behind = b"/" + after + b"|"
    alike = text + before == before + counted(start, stop).replace(b" ", behind + before)
    found = PLANNED.findall(before + number + behind if alike else text)
    whole = len(found) == (1 if alike else stop - start)
    return [int(count) + 1 - first or None for count in found] if whole else []


def _what_numbers(cells: Sequence[bytes], before: bytes) -> Sequence[float | None]:
    """The number in each cell; None where there is none."""
    try:
        return _numbers(cells, before)
    except ValueError:
        parts = (cell.strip().partition(b":") for cell in cells)
        return [number(value) if key + b":" == before.strip() else None for key, _, value in parts]


def _numbers(cells: Sequence[bytes], before: bytes, *, often: bool = False) -> Sequence[float]:
    """The number above 0 in each cell, behind the same words; one for all if they are the same, which may be 0.

    ValueError where there is none.
    """
    if cells[0] == cells[-1] and cells.count(cells[0]) == len(cells):
        return (_number(cells[0], before),)
    read = _known_numbers if often else _read_numbers
    return read(b"|".join((b"", *cells)), before, len(cells))


def _read_numbers(text: bytes, before: bytes, count: int) -> Sequence[float]:
    """So many numbers above 0, each behind a | and these words; ValueError."""
    first, *parts = text.split(b"|" + before)
    if first or len(parts) != count:
        raise ValueError
    numbers = list(map(float, parts))
    if min(numbers) <= 0:
        raise ValueError
    return numbers


_known_numbers = lru_cache(maxsize=100)(_read_numbers)


@lru_cache(maxsize=1000)
def _number(cell: bytes, before: bytes) -> float:
    """The number from 0 in a cell behind these words; ValueError."""
    if not cell.startswith(before) or (found := float(cell[len(before) :])) < 0:
        raise ValueError
    return found


_shapes: dict[bytes, Shape] = {}  # by bare line


def bare(text: bytes) -> bytes:
    """The text without whatever varies from one step line to the next."""
    return text.translate(None, VARYING)


def barest(text: bytes) -> bytes:
    """The text without whatever varies, and without exponents' e, which some numbers have and others have not."""
    return without_exponents(bare(text))


def without_exponents(bared: bytes) -> bytes:
    """Bare text without the e of numbers, which stand between a colon and a |; those of words stay."""
    return bared.replace(b":e|", b":|").replace(b":e\n", b":\n")


def shape_of(line: bytes) -> Shape | None:
    """What a line has in common with those like it; None where such lines must be read one by one."""
    key = bare(line)
    shape = _shapes.get(key)
    if shape is None and (shape := _shape(line, key)):
        if len(_shapes) > 1000:  # lines that are never alike
            _shapes.clear()
        _shapes[key] = shape
    return shape


def whole_chunk(text: bytes) -> Chunk | None:
    """The text as one chunk, if there are step lines of one shape in it and nothing else."""
    end = text.find(b"\n") + 1
    first = text[:end]
    shape = shape_of(first)
    if shape is None:
        return None
    second = text[end : text.find(b"\n", end) + 1] or first
    line = first.translate(None, DIGITS)
    if second.translate(None, DIGITS) == line and shape.keys is NEMO_KEYS:  # which pads no number
        words = text.translate(None, DIGITS)
        count = len(words) // len(line)
        if words == line * count:
            return chunk_of(text, count, shape, even=True)
    if barest(second) != barest(first):
        return None
    bared = bare(text)
    count, rest = divmod(len(bared), len(shape.bare))
    if not rest and bared == shape.bare * count:
        return chunk_of(text, count, shape, even=True)
    bared, line = without_exponents(bared), barest(first)
    count, rest = divmod(len(bared), len(line))
    return None if rest or bared != line * count else chunk_of(text, count, shape, even=False)


def chunk_of(text: bytes, count: int, shape: Shape, *, even: bool) -> Chunk | None:
    """The `count` lines of that shape as a chunk; None if their steps do not follow one another, or have no time.

    The same numbers of each line have an exponent where they are `even`.
    """
    numbers = shape.number.findall(text)
    if len(numbers) != count:
        return None
    if shape.constant and any(text.count(cell) != count for cell in shape.constant):
        return None
    if may_overflow(text, exponents=shape.exponents or not even):
        return None
    first = int(numbers[0])
    if first < shape.keys.first or b" ".join((*numbers, b"")) != counted(first, first + count):
        return None
    return Chunk(first - shape.keys.first, first - shape.keys.first + count - 1, text)


def may_overflow(text: bytes, *, exponents: bool) -> bool:
    """Whether a number may be beyond what a float can be, 1e308: by 300 digits in a row; by 200, or 3 of an exponent's."""
    every = 20 if exponents else 30  # a look at each byte would take as long as all the rest
    if b"0" * 9 in text[::every].translate(DIGITS_TO_0):
        return True
    digits = text.translate(DIGITS_TO_0) if exponents else b""
    return b"e000" in digits or b"e+000" in digits


@lru_cache(maxsize=100)  # many short logs have as many steps
def counted(first: int, stop: int) -> bytes:
    """`7 8 9 `: the numbers from `first` to before `stop`, a space behind each."""
    parts = []
    for thousand in range(first // 1000, (stop + 999) // 1000):
        within = slice(max(first - 1000 * thousand, 0), stop - 1000 * thousand)
        parts.append((b"%d" % thousand).join((b"", *PADDED[within])) if thousand else b"".join(NUMBERS[within]))
    return b"".join(parts)


def _shape(line: bytes, key: bytes) -> Shape | None:
    read = parse(line)
    if read is None or read.number is None or read.invalid or read.bar or line.count(NEMO) + line.count(MEGATRON) != 1:
        return None
    if b"{" in line or BRIDGE in line:  # which say something else as well
        return None
    keys = NEMO_KEYS if NEMO in line else MEGATRON_KEYS
    if is_damaged(line, keys, VARYING):  # the others like it are not
        return None
    if keys.number and b"| %s: " % keys.number in line:
        numbers = rb"\| %s: (\d{1,9}) \|" % re.escape(keys.number)
    elif keys.number and keys.number in line:
        return None
    else:
        numbers = rb" iteration +(\d{1,9})/ *\d{1,9} *\|"
    found = [(match.span(), part) for part in (numbers, _time(keys)) for match in re.finditer(part, line)]
    if len(found) != 2:
        return None
    number = _between(line, *sorted(found))
    said = tuple(cells_of(line, keys))
    cells = line.replace(b"\n", b"|").split(b"|")[:-1]
    constant = [cell for cell in cells if any(name + b":" in cell for name in keys.spoiled)]
    if keys is MEGATRON_KEYS:  # which leaves a loss out that is no number
        constant += [b"|" + before for name, _, before in said if name == "loss"]
    judged = {*keys.names["loss"], *keys.names["grad_norm"]}
    values = [cell.partition(b":")[2] for cell in cells if cell.partition(b":")[0].strip() in judged]
    exponents = any(b"e" in value.lower() for value in values)
    counts = barest(cells[0]).endswith(barest(b"iteration/"))
    shape = Shape(key, number, keys, counts, tuple(constant), exponents, len(cells), said)
    span = _span(shape, cells, range(read.number, read.number + 1))
    return shape if span is not None and span[read.number] == read.step else None


def _time(keys: Keys) -> bytes:
    return rb"\| %s: " % re.escape(keys.names["time_s"][0])


def _between(line: bytes, one: tuple[tuple[int, int], bytes], other: tuple[tuple[int, int], bytes]) -> re.Pattern[bytes]:
    """Two patterns, found in a line, and what is passed over between them and up to the next line's first.

    There nothing need be looked at: where lines are alike each has as much there, besides the digits of numbers.
    """
    (begin, start), (stop, end) = one[0], other[0]
    inner, outer = line[start:stop], line[end:] + line[:begin]
    least, after = (len(barest(part)) + part.count(b" ") for part in (inner, outer))
    return re.compile(one[1] + rb"(?s:.{%d,%d})" % (least, len(inner) + LONGER) + other[1] + rb"(?s:.{0,%d})" % after)
