"""Lines that say how a run ended, or what it was. In: text. Out: a `Told` for each, with its kind, rank and place.

The kinds are in ftgen/catalogue/run_lines.toml. A log may have gigabytes of other text: words are looked for first, which is
fast, and patterns only in text that has one.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from ftgen.catalogue import run_lines

# The line that ends a traceback, behind srun's, torch's and our own labels.
EXCEPTION = re.compile(
    rb"(?m)^(?:[^\n]{0,255}?(?:\d: |\]:? ?|/\d{1,6} |\| ))?"
    rb"((?:\w{1,80}\.){0,20}\w{0,80}(?:Error|Exception|Interrupt|Exit|Expired)(?::[^\n]*)?)\r?$"
)
# The labels of torch, torchrun and srun; of torchx and NeMo-Run, unless it is a date: `trainer/3 `, `12/31 `.
RANK = re.compile(
    rb"\[rank ?(\d{1,6})(?:\]| on )|\[default(\d{1,6})\]|^ *(\d{1,6}): |^(?=\S*[A-Za-z_])[^\s/]{1,120}/(\d{1,6}) "
)
JSON = frozenset({"plan", "environment", "node"})
LONGEST_JSON = 1 << 20  # bytes
LONGEST_TRACEBACK = 1 << 16  # bytes
LONGEST_NOTE = 200  # bytes kept of a line, on each side of the words

KINDS = run_lines()
EVERY = frozenset(kind for kind, line in KINDS.items() if line.every)  # of others the first line is told
WORDS = tuple(dict.fromkeys(word for line in KINDS.values() for word in line.words))
WORDS_BETWEEN_STEPS = tuple(dict.fromkeys(word for line in KINDS.values() if line.between_steps for word in line.words))
PATTERN = re.compile(b"|".join(b"(?P<%s>%s)" % (kind.replace(" ", "_").encode(), KINDS[kind].pattern) for kind in KINDS))

# Bytes of the words that are rare between step lines, the rarest first. To look for a byte takes a tenth of the time.
RARE = [bytes([byte]) for byte in b"*{EOCD`(I"]


class Told(NamedTuple):
    """One line that tells something of the run's end, or of the run as a whole."""

    kind: str
    note: str
    number: int | None = None  # an exit status, or the steps that training says it made
    rank: int | None = None  # whose line it is, by the label of srun, torch or ftgen
    json: bytes = b""  # of the kinds in JSON
    file: str = ""  # another file than the log
    row: int | None = None  # the line's number in the file, from 1
    steps_before: int = 0  # step lines before it
    at: int = 0  # where in the text that was searched


def has_words(text: bytes, words: tuple[bytes, ...] = WORDS) -> bool:
    """Whether one of the words is in the text."""
    for word in words:
        rare = next((byte for byte in RARE if byte in word), b"")
        if rare in text and text.rfind(word) >= 0:  # rfind() takes half the time of find()
            return True
    return False


def find(text: bytes) -> Iterator[Told]:
    """The first line of each kind in the text, in the text's order; of kinds in EVERY each line."""
    seen: set[str] = set()
    for match in PATTERN.finditer(text) if has_words(text) else ():
        kind = str(match.lastgroup).replace("_", " ")
        if kind in seen and kind not in EVERY:
            continue
        number = next((int(group) for group in match.groups() if group and group.isdigit()), None)
        line = _line(text, match.start(), LONGEST_NOTE, before=LONGEST_NOTE)
        json = _line(text, match.end() - 1, LONGEST_JSON) if kind in JSON else b""
        yield Told(kind, _decoded(line), number, rank_of(line), json, at=match.start())
        seen = set() if kind == "plan" else seen | {kind}  # a plan begins another attempt
        if kind == "traceback" and (told := exception(text, match.end(), LONGEST_TRACEBACK)):
            yield told


def start(line: bytes) -> int:
    """Where something is told in a line that another process printed into."""
    found = PATTERN.search(line)
    return found.start() if found else 0


def exception(text: bytes, start: int, most: int) -> Told | None:
    """The first line, within so many bytes from `start`, that ends a traceback."""
    found = EXCEPTION.search(text, start, start + most)
    if not found:
        return None
    return Told("exception", _decoded(found.group(1)), rank=rank_of(found.group()[:LONGEST_NOTE]), at=found.start())


def rank_of(line: bytes) -> int | None:
    """Whose line it is, by its label; None if it has none."""
    label = RANK.search(line)
    return next((int(digits) for digits in label.groups() if digits), None) if label else None


def _line(text: bytes, at: int, most: int, *, before: int = 0) -> bytes:
    """The line around `at`, at most `before` bytes before it and `most` after: some lines never end."""
    head = text[max(0, at - before) : at].rpartition(b"\n")[2]
    return head + text[at : at + most].partition(b"\n")[0]


def _decoded(line: bytes) -> str:
    return line[: 2 * LONGEST_NOTE].decode("utf-8", "replace").strip()
