"""Reading a log block by block. In: a `Log` and its next `Block`. Out: the log, with what the block's lines say.

`feed` is the only way into a log, so that a log that grows says what a fresh read of it would say.
"""

from collections.abc import Iterator
from itertools import groupby

from ftgen.logs import attempts, failures, formats, settings
from ftgen.logs.blocks import Block
from ftgen.logs.failures import Told
from ftgen.logs.formats import bridge, nemo
from ftgen.logs.identity import document
from ftgen.logs.log import NEAR, Log
from ftgen.logs.step import StepLine, StepTime
from ftgen.logs.steps import Steps

((HEAD,), _) = failures.KINDS["plan"]  # ftgen's own: the plan as one line of JSON
LONGEST_LINE = 1 << 16  # bytes of a step line that are looked at
LABEL = 100  # bytes at the beginning of a step line in which its rank may stand
EDGE = 4096  # bytes at the beginning and the end of a log in which a time is looked for


def feed(log: Log, block: Block) -> None:
    """Take the next lines."""
    if len(log.first_bytes) < EDGE:
        log.first_bytes = (log.first_bytes + block.raw)[:EDGE]
    log.last_bytes = (log.last_bytes + block.raw)[-EDGE:] if len(block.raw) < EDGE else block.raw[-EDGE:]
    _feed(log, block.text, block)
    log.rows += block.rows


def _feed(log: Log, text: bytes, block: Block) -> None:
    """Text before the first step line, and from there on step lines and other lines in turn."""
    words = formats.words_in(text)
    if not words or (words == [nemo.UNTIMED] and log.timed):  # a line that lost its time is none
        _take_text(log, text, block)
        return
    start = text.rfind(b"\n", 0, min(map(text.find, words))) + 1
    if b"{" in text and (head := text.find(HEAD, start)) >= 0 and (head := text.rfind(b"\n", 0, head) + 1) > start:
        _feed(log, text[:head], block)  # another attempt begins behind these steps
        _feed(log, text[head:], block)
        return
    _take_text(log, text[:start], block)
    if words != [nemo.UNTIMED] and not log.timed:
        _forget_untimed(log)
    done = _take_alike(log, text, start, block) if words == [nemo.WORD] else start
    for is_step, lines in _grouped(text[done:], words):
        if is_step:
            _take_lines(log, lines, block)
        else:
            _take_text(log, b"".join(lines), block)


def _forget_untimed(log: Log) -> None:
    """Steps of lines that lost their time, before the first one with a time."""
    log.timed = True
    log.steps, log.last_of, log.step_lines = Steps(), {}, 0
    log.invalid = log.left_out = None
    log.has_losses, log.skipped = False, []


def _take_alike(log: Log, text: bytes, start: int, block: Block) -> int:
    """Many of NeMo's step lines at once, with whatever stands between them, if they are that plain. Where they end."""
    stop = text.rfind(nemo.WORD)
    stop = text.find(b"\n", stop) + 1
    count = text.count(nemo.WORD, start, stop)
    if count <= NEAR or log.traceback:
        return start
    scanned = nemo.scan(text, start, stop)
    final = nemo.parse(text[text.rfind(b"\n", start, stop - 1) + 1 : stop])
    if not scanned or len(scanned.numbers) != count or not final or final.step.grad_norm is not None:
        return start  # a gradient norm may be infinite
    last = stop  # what stands after this line may be near the end of the run
    for _ in range(NEAR + 1):
        last = text.rfind(nemo.WORD, start, last)
    last = text.find(b"\n", last) + 1
    if count < block.rows and failures.has_words(text, start, last, anywhere=True):
        return start
    if not attempts.goes_on(log, scanned.numbers[0]) or not log.steps.add_scanned(text, scanned):
        return start
    log.last_of[failures.rank_of(text[start : start + LABEL])] = scanned.numbers[-1]
    log.has_losses = True
    log.step_lines += count - NEAR
    for is_step, lines in _grouped(text[last:stop], [nemo.WORD]):
        if is_step:
            log.step_lines += len(lines)
        else:
            _take_text(log, b"".join(lines), block)
        log.width = len(lines[-1])
    return stop


def _take_lines(log: Log, lines: list[bytes], block: Block) -> None:
    """Step lines, one by one. What another process printed into one counts as well."""
    for line in lines:
        read = formats.parse(line[:LONGEST_LINE])
        if isinstance(read, StepTime):
            log.step_times.append(read)
        elif isinstance(read, StepLine):
            _take_step(log, read, failures.rank_of(line[:LABEL]))
        else:
            log.damaged += 1
            log.widths[log.width] += 1
            _take_text(log, line[failures.start(line) : LONGEST_LINE], block)
        log.traceback = max(0, log.traceback - len(line))
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


def _take_text(log: Log, text: bytes, block: Block) -> None:
    """Text without step lines."""
    if not text:
        return
    if log.traceback and (told := failures.exception(text, 0, log.traceback)):
        _take(log, told, block)
    log.traceback = max(0, log.traceback - len(text))
    if bridge.MEMORY in text:
        log.peak_memory = max(filter(None, (log.peak_memory, bridge.peak_memory(text))), default=None)
    for told in failures.find(text):
        _take(log, told, block)
        if told.kind == "traceback":
            log.traceback = failures.LONGEST_TRACEBACK - (len(text) - text.find(told.line) - len(told.line))
    if not log.steps:
        log.said = dict(sorted((settings.find(text) | log.said).items()))  # what is said first counts
    log.width = len(text) - text.rfind(b"\n", 0, len(text) - 1) - 1


def _take(log: Log, told: Told, block: Block) -> None:
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
    log.tell(told._replace(row=log.rows + block.row_of(told.kind, told.line)))


def _grouped(text: bytes, words: list[bytes]) -> Iterator[tuple[bool, list[bytes]]]:
    """Lines that follow each other and are step lines, or are none."""
    lines = groupby(text.splitlines(keepends=True), lambda line: any(word in line for word in words))
    return ((is_step, list(lines)) for is_step, lines in lines)
