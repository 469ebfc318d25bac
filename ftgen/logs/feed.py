"""Reading a log block by block. In: a `Log` and the bytes that come next. Out: the log, with what their lines say.

`feed` is the only way into a log, so that a log that grows says what a fresh read of it would say.
"""

import re
from collections.abc import Iterator
from itertools import groupby, pairwise

from ftgen.logs import attempts, failures, formats, marks
from ftgen.logs.blocks import rows, shown
from ftgen.logs.failures import Told
from ftgen.logs.formats import bridge, nemo
from ftgen.logs.identity import document, settings_in
from ftgen.logs.log import NEAR, Log
from ftgen.logs.step import StepLine, StepTime
from ftgen.logs.steps import Steps

(HEAD,) = failures.KINDS["plan"].words  # ftgen's own: the plan as one line of JSON
LONGEST_LINE = 1 << 16  # bytes of a step line that are looked at
LABEL = 100  # bytes at the beginning of a step line in which its rank may stand
EDGE = 4096  # bytes at the beginning and the end of a log in which a time is looked for


def feed(log: Log, raw: bytes) -> None:
    """Take the next lines."""
    log.first_bytes = (log.first_bytes + raw[:EDGE])[:EDGE]
    log.last_bytes = (log.last_bytes + raw[-EDGE:])[-EDGE:]
    text = shown(raw)
    heads: set[int] = set()  # where another attempt begins
    if b"{" in text and HEAD in text:  # to look for a byte takes a tenth of the time
        heads = {text.rfind(b"\n", 0, head.start()) + 1 for head in re.finditer(re.escape(HEAD), text)}
    for start, stop in pairwise(sorted({0, *heads, len(text)})):
        _feed(log, text[start:stop])


def _feed(log: Log, text: bytes) -> None:
    """Text before the first step line, and from there on step lines and other lines in turn."""
    words = formats.words_in(text)
    if words == [nemo.UNTIMED] and log.timed:  # a line that lost its time is none
        words = []
    start = text.rfind(b"\n", 0, min(map(text.find, words))) + 1 if words else len(text)
    _take_text(log, text[:start])
    if words and words != [nemo.UNTIMED] and not log.timed:
        _forget_untimed(log)
    if words == [nemo.WORD]:
        start = _take_alike(log, text, start)
    for is_step, lines in _grouped(text[start:], words):
        if is_step:
            _take_lines(log, lines)
        else:
            _take_text(log, b"".join(lines))


def _forget_untimed(log: Log) -> None:
    """Steps of lines that lost their time, before the first one with a time."""
    log.timed = True
    log.steps, log.last_of, log.step_lines = Steps(), {}, 0
    log.invalid = log.left_out = None
    log.has_losses, log.skipped = False, []


def _take_alike(log: Log, text: bytes, start: int) -> int:
    """Read all of NeMo's step lines in a text at once. Returns where the unread rest begins.

    That is `start` if the lines must be read one by one: one of them is unusual, or the lines between may tell something.
    """
    end = text.find(b"\n", text.rfind(nemo.WORD)) + 1 or text.rfind(b"\n") + 1
    part = text[start:end]
    alike = nemo.read_alike(part) if not log.traceback else None
    if not alike:
        return start
    part_rows = rows(part)
    others = part_rows > len(alike.numbers)
    if others and _tells(part):
        return start
    if not attempts.goes_on(log, alike.numbers[0]) or not log.steps.add_alike(alike):
        return start
    if others:
        log.marks += marks.find(part)
    log.last_of[failures.rank_of(part[:LABEL])] = alike.numbers[-1]
    log.has_losses = True
    log.step_lines += len(alike.numbers)
    log.rows += part_rows
    log.width = len(part) - part.rfind(b"\n", 0, len(part) - 1) - 1
    return end


def _tells(text: bytes) -> bool:
    """Whether the lines between step lines may say how the run went. Most kinds count only near the end of the text."""
    near = len(text)
    for _ in range(NEAR + 1):
        near = max(0, text.rfind(nemo.WORD, 0, near))
    return failures.has_words(text, failures.WORDS_BETWEEN_STEPS) or failures.has_words(text[near:])


def _take_lines(log: Log, lines: list[bytes]) -> None:
    """Step lines, one by one. What another process printed into one counts as well."""
    for line in lines:
        after = log.rows + rows(line)
        read = formats.parse(line[:LONGEST_LINE])
        if isinstance(read, StepTime):
            log.step_times.append(read)
        elif isinstance(read, StepLine):
            _take_step(log, read, failures.rank_of(line[:LABEL]))
        else:
            log.damaged += 1
            log.widths[log.width] += 1
            _take_text(log, line[failures.start(line) : LONGEST_LINE])
        log.traceback = max(0, log.traceback - len(line))
        log.rows = after
        log.width = len(line)


def _take_step(log: Log, read: StepLine, rank: int | None) -> None:
    number = _next(log, read) if read.number is None else read.number
    if not attempts.goes_on(log, number):
        attempts.start_over(log, number, log.last_of.get(rank, -1), read.step.global_batch_size)
    log.last_of[rank] = max(number, log.last_of.get(rank, number))
    if read.invalid and not log.invalid:
        log.invalid = f"{read.invalid} at step {number}"
    if read.skipped:
        log.skipped.append(number)
    if read.left_out and log.left_out is None:
        log.left_out = number
    log.has_losses |= read.step.loss is not None
    log.accumulated += log.steps.add(read, number)
    log.step_lines += 1


def _next(log: Log, line: StepLine) -> int:
    """The number of a step whose line does not say it: one more than the last if samples were consumed since."""
    last = log.steps.last
    return 0 if last < 0 else last + (line.step.consumed_samples != log.steps[last].consumed_samples)


def _take_text(log: Log, text: bytes) -> None:
    """Text without step lines."""
    if not text:
        return
    log.marks += marks.find(text)
    if log.traceback and (told := failures.exception(text, 0, log.traceback)):
        _take(log, told, text)
    log.traceback = max(0, log.traceback - len(text))
    if bridge.MEMORY in text:
        log.peak_memory = max(filter(None, (log.peak_memory, bridge.peak_memory(text))), default=None)
    for told in failures.find(text):
        _take(log, told, text)
        if told.kind == "traceback":
            log.traceback = max(0, failures.LONGEST_TRACEBACK - len(text) + told.at)
    if not log.steps:
        log.said = dict(sorted((settings_in(text) | log.said).items()))  # what is said first counts
    log.rows += rows(text)
    log.width = len(text) - text.rfind(b"\n", 0, len(text) - 1) - 1


def _take(log: Log, told: Told, text: bytes) -> None:
    """A line that tells something."""
    if told.kind == "plan":
        attempts.begin_plan(log, told.json)
    elif told.kind == "environment":
        log.environment = document(told.json)
    elif told.kind == "node":
        found = document(told.json) or {}
        log.nodes[str(found.get("node"))] = found
    elif told.kind == "exception":
        log.traceback = 0
    log.tell(told._replace(row=log.rows + rows(text[: told.at]) + 1, at=0))


def _grouped(text: bytes, words: list[bytes]) -> Iterator[tuple[bool, list[bytes]]]:
    """Lines that follow each other and are step lines, or are none."""
    lines = groupby(text.splitlines(keepends=True), lambda line: any(word in line for word in words))
    return ((is_step, list(lines)) for is_step, lines in lines)
