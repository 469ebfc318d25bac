"""Lines that say how a run ended, or what it was. In: text. Out: a `Told` for each, with its kind, rank and place.

A log may have gigabytes of other text. One word is looked for at a time, which is fast; patterns are for text that has one.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Each kind of line: the words that it is found by, and its pattern.
KINDS: dict[str, tuple[tuple[bytes, ...], bytes]] = {
    "plan": ((b"ftgen plan: {",), rb"ftgen plan: \{"),
    "environment": ((b"ftgen environment: {",), rb"ftgen environment: \{"),
    "node": ((b"ftgen node: {",), rb"ftgen node: \{"),
    "error": ((b"ftgen: error: ",), rb"ftgen: error: "),
    "exit": ((b"ftgen: exit status ",), rb"ftgen: exit status (\d{1,9})"),
    "job exit": ((b"job exited with code ",), rb"job exited with code (\d{1,9})"),
    "task exit": ((b"Exited with exit code ",), rb"Exited with exit code [1-9]"),
    "task killed": (
        (b"srun: error: ",),
        rb"srun: error: [^\n]{1,200}?: (?:Killed|Segmentation fault|Aborted|Bus error|Terminated|Out Of Memory)|"
        rb"srun: error: Node failure on [^\n]",
    ),
    "stopped": (
        (b"`Trainer.fit` stopped: `",),
        rb"`Trainer\.fit` stopped: `(?:max_steps=(\d{1,9})|max_epochs=\d{1,9})` reached",
    ),
    "exited": ((b"[exiting program at iteration ",), rb"\[exiting program at iteration +(\d{1,9})\]"),
    "done": ((b"[after training is done]",), rb"\[after training is done\]"),
    "not finite": ((b"found NaN in", b"found Inf in"), rb"found NaN in|found Inf in"),
    "out of memory": ((b"OutOfMemoryError", b"CUDA out of memory"), rb"OutOfMemoryError|CUDA out of memory"),
    "host memory": ((b"oom_kill event", b"oom-kill event"), rb"oom[-_]kill event"),
    "collective": (
        (b"Watchdog caught collective", b"watchdog thread terminated"),
        rb"Watchdog caught collective operation timeout|watchdog thread terminated with exception",
    ),
    # a limit, a node, somebody with more rights; or by hand, or because another task had failed
    "cancelled": ((b"*** STEP ", b"*** JOB "), rb"\*\*\* (?:STEP|JOB) [^\n]{1,200}? DUE TO "),
    "killed": ((b"*** STEP ", b"*** JOB "), rb"\*\*\* (?:STEP|JOB) [^\n]{1,200}? CANCELLED"),
    "traceback": ((b"Traceback (most recent call",), rb"Traceback \(most recent call last\)"),
}
# What is looked for between step lines too: it tells of the run as a whole, or must be mentioned though the run went on.
ANYWHERE = ("plan", "environment", "stopped", "not finite", "out of memory", "cancelled", "killed", "traceback")
REPEATED = frozenset({"plan", "node", "exit", "job exit", "stopped"})  # of these every line is told, of others the first
# The line that ends a traceback, behind srun's, torch's and our own labels.
EXCEPTION = re.compile(
    rb"(?m)^(?:[^\n]{0,255}?(?:\d: |\]:? ?|/\d{1,6} |\| ))?"
    rb"((?:\w{1,80}\.){0,20}\w{0,80}(?:Error|Exception|Interrupt|Exit|Expired)(?::[^\n]*)?)$"
)
# The labels of torch, torchrun and srun; of torchx and NeMo-Run, unless it is a date: `trainer/3 `, `12/31 `.
RANK = re.compile(
    rb"\[rank ?(\d{1,6})(?:\]| on )|\[default(\d{1,6})\]|^ *(\d{1,6}): |^(?=\S*[A-Za-z_])[^\s/]{1,120}/(\d{1,6}) "
)
JSON = frozenset({"plan", "environment", "node"})
LONGEST_JSON = 1 << 20  # bytes
LONGEST_TRACEBACK = 1 << 16  # bytes
LONGEST_NOTE = 200  # bytes kept of a line, on each side of the words
# The rarest first, in what stands between the step lines of tests/logs. To look for a byte takes a tenth of the time.
RARE = b"*{EOCD`(I"


class Told(NamedTuple):
    """One line that tells something of the run's end, or of the run as a whole."""

    kind: str
    note: str
    line: bytes  # what is kept of it, as it stands in the log
    number: int | None = None  # an exit status, or the steps that training says it made
    rank: int | None = None  # whose line it is, by the label of srun, torch or ftgen
    json: bytes = b""  # of the kinds in JSON
    file: str = ""  # another file than the log
    row: int | None = None  # the line's number in the file, from 1
    steps_before: int = 0  # step lines before it


def _words(kinds: Iterable[str]) -> list[tuple[bytes, bytes]]:
    """The words of these kinds, each behind the rarest byte in it or nothing."""
    words = dict.fromkeys(word for kind in kinds for word in KINDS[kind][0])
    return [(next((bytes([rare]) for rare in RARE if rare in word), b""), word) for word in words]


PATTERNS = {kind: re.compile(pattern) for kind, (_, pattern) in KINDS.items()}
PATTERN = re.compile(b"|".join(pattern for _, pattern in KINDS.values()))
WORDS, WORDS_ANYWHERE = _words(KINDS), _words(ANYWHERE)


def has_words(text: bytes, start: int = 0, stop: int | None = None, *, anywhere: bool = False) -> bool:
    """Whether a part of a text has the words of a kind, or of a kind that is looked for ANYWHERE."""
    words = WORDS_ANYWHERE if anywhere else WORDS
    # rfind() takes half the time of find()
    return any(text.find(rare, start, stop) >= 0 and text.rfind(word, start, stop) >= 0 for rare, word in words)


def find(text: bytes) -> Iterator[Told]:
    """The first line of each kind in the text, in the text's order; of REPEATED kinds every line."""
    if not has_words(text):
        return
    seen: set[str] = set()
    for match in PATTERN.finditer(text):
        kind = next(kind for kind in KINDS if PATTERNS[kind].match(text, match.start()))
        if kind in seen and kind not in REPEATED:
            continue
        number = next((int(digits) for digits in match.groups() if digits), None)
        line = _line(text, match.start(), LONGEST_NOTE, before=LONGEST_NOTE)
        json = _line(text, match.end() - 1, LONGEST_JSON) if kind in JSON else b""
        yield Told(kind, _decoded(line), line, number, rank_of(line), json)
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
    line = found.group()[:LONGEST_NOTE]
    return Told("exception", _decoded(found.group(1)), line, None, rank_of(line))


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
