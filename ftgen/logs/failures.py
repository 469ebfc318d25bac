"""How a run ended. In: the text between step lines. Out: the lines that tell, each with its kind and rank.

Between them logs hold gigabytes of other things: a text is looked at closely only if one of a few words is in it.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

# Lines that say how a run ended; each is found by one of WORDS.
KINDS = {
    "plan": rb"ftgen plan: \{",
    "environment": rb"ftgen environment: \{",
    "error": rb"ftgen: error: ",
    "exit": rb"ftgen: exit status (\d{1,9})",
    "job exit": rb"job exited with code (\d{1,9})",
    "task exit": rb"Exited with exit code [1-9]",
    "stopped": rb"`Trainer\.fit` stopped: `max_steps=(\d{1,9})` reached",
    "done": rb"\[after training is done\]",
    "not finite": rb"found NaN in|found Inf in",
    "out of memory": rb"OutOfMemoryError|CUDA out of memory",
    "host memory": rb"oom[-_]kill event",
    "collective": rb"Watchdog caught collective operation timeout",
    "cancelled": rb"\*\*\* (?:STEP|JOB) [^\n]{1,200}? DUE TO ",  # a limit, a node, somebody with more rights
    "killed": rb"\*\*\* (?:STEP|JOB) [^\n]{1,200}? CANCELLED",  # by hand, or because another task had failed
    "traceback": rb"Traceback \(most recent call last\)",
}
WORDS = (
    b"ftgen plan: {",
    b"ftgen environment: {",
    b"ftgen: error: ",
    b"ftgen: exit status ",
    b"job exited with code ",
    b"Exited with exit code ",
    b"`Trainer.fit` stopped: `",
    b"[after training is done]",
    b"found NaN in",
    b"found Inf in",
    b"OutOfMemoryError",
    b"CUDA out of memory",
    b"oom_kill event",
    b"oom-kill event",
    b"Watchdog caught collective",
    b"*** STEP ",
    b"*** JOB ",
    b"Traceback (most recent call",
)
RARE = b"{`*["  # looking for one byte takes a tenth of the time that looking for a word does
AT_ONCE = 32 << 10  # bytes: in less, word by word is as fast
GUARDED = tuple((next((bytes([byte]) for byte in RARE if byte in word), b""), word) for word in WORDS)
ENDING = re.compile(b"|".join(KINDS.values()))
PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
# The line that ends a traceback, behind srun's, torch's and our own labels.
EXCEPTION = re.compile(
    rb"(?m)^(?: *\d+: )?(?:\[rank\d+\]: ?|\[rank \d+ on [^]\n]{1,255}\] )?"
    rb"((?:\w{1,80}\.){0,20}\w{0,80}(?:Error|Exception|Interrupt|Exit|Expired)(?::[^\n]*)?)$"
)
RANK = re.compile(rb"\[rank ?(\d{1,6})(?:\]| on )|^ *(\d{1,6}): ")

LAST_COUNTS = frozenset({"plan", "exit", "job exit", "stopped"})
MOST_JSON = 1 << 20  # bytes
LONGEST_TRACEBACK = 1 << 16  # bytes
LONGEST_NOTE = 200  # bytes kept of a line, on each side of what is told by it


class Ending(NamedTuple):
    """One line that tells something of the run's end, or of the run as a whole."""

    kind: str
    note: str
    line: bytes  # what of it was kept, as it stands in the log
    number: int | None = None  # an exit status, or the steps that training says it made
    rank: int | None = None  # whose line it is, by srun's label, torch's or our own
    json: bytes = b""  # of the kinds plan and environment
    at: int | None = None  # byte of the file
    file: str = ""  # another than the log
    row: int | None = None  # the line's number, from 1, where it has been counted


def endings(text: bytes) -> Iterator[Ending]:
    """The first line of each kind, in the text's order, with the line that ends a traceback; of some kinds every line."""
    if not tells(text):
        return
    told: set[str] = set()
    for match in ENDING.finditer(text):
        kind = next(kind for kind, pattern in PATTERNS.items() if pattern.match(text, match.start()))
        if kind in told and kind not in LAST_COUNTS:
            continue
        number = next((int(digits) for digits in match.groups() if digits), None)
        line = _line(text, match.start(), LONGEST_NOTE, before=LONGEST_NOTE)
        json = _line(text, match.end() - 1, MOST_JSON) if kind in {"plan", "environment"} else b""
        yield Ending(kind, _decoded(line), line, number, _rank(line), json)
        told = set() if kind == "plan" else told | {kind}  # another attempt begins
        if kind == "traceback" and (exception := EXCEPTION.search(text, match.end(), match.end() + LONGEST_TRACEBACK)):
            line = exception.group()[:LONGEST_NOTE]
            yield Ending("exception", _decoded(exception.group(1)), line, None, _rank(line))


def tells(text: bytes) -> bool:
    """Whether one of WORDS is in the text, so that something may be told there."""
    return survey(text)[0]


def survey(text: bytes, word: bytes = b"") -> tuple[bool, list[int]]:
    """Whether something may be told in the text, and where another word ends, each time that it is there."""
    if len(text) >= AT_ONCE and (search := _search_at_once(word)):
        return search(text)
    told = any(rare in text and each in text for rare, each in GUARDED)
    return told, [match.end() for match in re.finditer(re.escape(word), text)] if word else []


@cache
def _search_at_once(word: bytes) -> Callable[[bytes], tuple[bool, list[int]]] | None:
    """What looks for all the words in one go, ten times as fast as one after the other; None without the package."""
    try:
        import hyperscan
    except ImportError:  # there is no wheel for this machine
        return None
    words = hyperscan.Database()
    wanted = [*WORDS, word] if word else WORDS
    flags = [hyperscan.HS_FLAG_SINGLEMATCH] * len(WORDS) + [0] * (len(wanted) - len(WORDS))
    words.compile(expressions=list(map(re.escape, wanted)), ids=list(range(len(wanted))), flags=flags)

    def search(text: bytes) -> tuple[bool, list[int]]:
        told: list[int] = []
        places: list[int] = []
        others, add = len(WORDS), places.append

        def found(number: int, _start: int, end: int, _flags: int, _context: object) -> None:
            if number == others:
                add(end)
            else:
                told.append(number)

        words.scan(text, match_event_handler=found)
        return bool(told), places

    return search


def _rank(line: bytes) -> int | None:
    label = RANK.search(line)
    return int(label[1] or label[2]) if label else None


def _line(text: bytes, at: int, most: int, *, before: int = 0) -> bytes:
    """The line around `at`, at most `before` bytes before it and `most` after: lines need not end."""
    head = text[max(0, at - before) : at].rpartition(b"\n")[2]
    return head + text[at : at + most].partition(b"\n")[0]


def _decoded(line: bytes) -> str:
    return line[: 2 * LONGEST_NOTE].decode("utf-8", "replace").strip()
