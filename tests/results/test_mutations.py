"""What damage does to figures: none that is not said.

One edit of a healthy log either changes what is said of the run (status, reason, warnings, notes) or leaves its figures as
they were: all of them exactly, but for a step's time and peak memory, of which no line is certain beyond its measure.
There an edit may go unsaid up to the thresholds of `warnings`: 2 x OUTLIER of one step in the window, MEMORY of the peak.
"""

import re
import tempfile
from functools import cache
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logs import make

from ftgen.logs import blocks
from ftgen.logs.find import find_runs
from ftgen.logs.read import read_log
from ftgen.results.summary import summarize
from ftgen.results.warnings import MEMORY, OUTLIER

NAME = "lora_nemo_llama3_8b_fp8_8"
STEPS, WINDOW, EVERY = 30, 20, 5
TIME = 2 * OUTLIER / WINDOW * (1 + OUTLIER)  # of a window of as many values as steps
WORK = 1.84e14 * 32 * 2 / 3 / 8 / 1e12  # TFLOP of one GPU in a step


def seconds(step):
    return (2.0 if step < 3 else 0.68) * (1 + (step * 7 % 11 - 5) / 1000)


def nemo(tflops=False):
    for step in range(STEPS):
        keys = {"TFLOPS_per_GPU": f"{WORK / seconds(step):.4}", "grad_norm": f"{1 + step / 100:.4}"} if tflops else {}
        yield make.step_line(step, STEPS - 1, 32, seconds(step), **keys)


def bars():
    return ("\r".join(make.bar(step, STEPS, 32, seconds(step)) for _ in range(2)) + "\n" for step in range(STEPS))


def megatron():
    return (line for step in range(STEPS) for line in make.megatron(step, STEPS, 32, seconds(step), WORK))


def at_intervals():
    for step in range(EVERY - 1, STEPS, EVERY):
        mean_s = sum(map(seconds, range(step + 1 - EVERY, step + 1))) / EVERY
        yield make.megatron(step, STEPS, 32, mean_s, WORK)[1]


def some(every, turn):
    """All of these; under `make quick` every fifth, others at each turn."""
    return [*every] if hypothesis.settings().max_examples >= 100 else [*every][turn % 5 :: 5]


@cache
def healthy(kind):
    """A log, and the plan beside it."""
    plan = make.plan("lora", "fp8", 8, STEPS)
    head = f"ftgen plan: {make.json.dumps(make.json.loads(plan.to_json()))}\n"
    ended = ["some words\n", f"`Trainer.fit` stopped: `max_steps={STEPS}` reached.\n", "ftgen: exit status 0\n"]
    lines = {
        "ours": [head, "ftgen: training\n", *nemo(), *ended],
        "with TFLOPS": [head, *nemo(tflops=True), *ended],
        "the launcher's": ["0: words\n", *make.labelled(nemo()), "0: [after training is done] datetime: 2025\n"],
        "a progress bar's": [*bars(), "[after training is done] datetime: 2025\n"],
        "Megatron-LM's": [*list(megatron())[1::2], "[after training is done] datetime: 2025-12-22\n"],
        "at intervals": [*at_intervals(), "[after training is done] datetime: 2025-12-22\n"],
        "Megatron's": [*megatron(), "[after training is done] datetime: 2025-12-22\n"],
    }[kind]
    return "".join(lines).encode(), plan.to_json() if head in lines else None


KINDS = ["ours", "with TFLOPS", "the launcher's", "a progress bar's", "Megatron-LM's", "Megatron's", "at intervals"]

NUMBER = re.compile(rb"(?<![\w.])-?\d[\d.]*(?:[eE][-+]?\d+)?")
BEYOND = [
    *("1e400", "1e999", "-1e999", "1E999", "1e+400", "1e0400", "9" * 400, "9" * 250 + "e99"),
    *("inf", "-inf", "Inf", "INF", "Infinity", "nan", "-nan", "NaN", "NAN"),
]
ODD = [*BEYOND, "1e-400", "1e5", "1e35", "0x1p3", "1_000", "١٢", "１.５", "1..2", "--1", "1e", "1,5", "0", "0.0", "", " "]


@cache
def folder(_name):
    """One for all edits: making and removing a folder takes longer than reading a log."""
    return tempfile.TemporaryDirectory()


def summary(text, plan):
    place = Path(folder("with a plan").name, NAME)
    place.mkdir(exist_ok=True)
    place.joinpath(f"log-a.{NAME}_1_0.out").write_bytes(text)
    if plan:
        place.joinpath("plan.json").write_text(plan)
    else:
        place.joinpath("plan.json").unlink(missing_ok=True)
    (run,) = find_runs([place.parent])
    return summarize(run)


def said(run):
    return run.status, run.reason, run.warnings, run.notes


def close(one, other, share):
    return one == other or (one is not None and other is not None and abs(one - other) <= share * min(one, other))


@st.composite
def edits(draw, text):
    """The text with one edit."""
    digits = [at for at, byte in enumerate(text) if byte in b"0123456789"]
    at = draw(st.one_of(st.integers(0, len(text) - 1), st.sampled_from(digits)))
    kind = draw(st.sampled_from(["digit", "byte", "insert", "delete", "span", "cut", "repeat", "move", "join", "number"]))
    if kind == "number":
        number = draw(st.sampled_from([*NUMBER.finditer(text)]))
        return text[: number.start()] + draw(st.sampled_from(ODD)).encode() + text[number.end() :]
    if kind in {"repeat", "move", "join"}:
        lines = text.splitlines(keepends=True)
        one, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        line = lines[one].rstrip(b"\n") if kind == "join" else lines[one]
        if kind != "repeat":
            del lines[one]
        lines.insert(one if kind == "join" else other, line)
        return b"".join(lines)
    put, gone = {
        "digit": (draw(st.sampled_from("0123456789")).encode(), 1),
        "byte": (draw(st.binary(min_size=1, max_size=1)), 1),
        "insert": (
            draw(st.sampled_from([b"0", b"7", b".", b"-", b"e5", b" ", b"|", b"\n", b"\r", b"\0", b"\x1b[1m", b"\xff"])),
            0,
        ),
        "delete": (b"", 1),
        "span": (b"", draw(st.integers(2, 600))),
        "cut": (b"", len(text)),
    }[kind]
    return text[:at] + put + text[at + gone :]


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_log_has_no_warning(kind):
    run = summary(*healthy(kind))
    notes = (f"the log has a step line every {EVERY} steps",) if kind == "at intervals" else ()
    if kind not in {"ours", "with TFLOPS"}:
        notes += ("assumed, because the log does not say it: gpu h100, gpus 8, seq_length 4096",)
    assert said(run) == ("complete", None, (), notes)
    assert run.step_time_s == pytest.approx(sum(seconds(step) for step in range(10, 30)) / 20, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_one_edit_is_said_or_changes_no_figure(kind, data):
    text, plan = healthy(kind)
    said_or_harmless(summary(text, plan), summary(data.draw(edits(text)), plan), of_one_value(kind))


def of_one_value(kind):
    """What goes unsaid of the step time: what one of the window's values may be off."""
    return TIME * (EVERY if kind == "at intervals" else 1)


def said_or_harmless(before, after, time):
    if said(before) != said(after):
        return
    assert close(after.step_time_s, before.step_time_s, time)
    assert close(after.tokens_per_s, before.tokens_per_s, time)
    assert close(after.mfu, before.mfu, time)
    assert close(after.days_per_1t_tokens, before.days_per_1t_tokens, time)
    assert close(after.peak_memory_gib, before.peak_memory_gib, MEMORY)
    sizes = ("steps", "planned_steps", "gpus", "global_batch_size", "seq_length", "window", "window_first", "window_last")
    assert [getattr(after, key) for key in sizes] == [getattr(before, key) for key in sizes]


def read_both_ways(text):
    """The log as it is read at once, which is as it is read line by line."""
    place = Path(folder("alone").name)
    place.joinpath(f"log-a.{NAME}_1_0.out").write_bytes(text)
    (run,) = find_runs([place])
    with pytest.MonkeyPatch.context() as patch:
        at_once = read_log(run)
        patch.setattr(blocks, "BLOCK", 100)
        assert repr(read_log(run)) == repr(at_once)
    return at_once


@given(st.data(), st.sampled_from(KINDS))
def test_many_lines_at_once_say_what_each_of_them_says(data, kind):
    read_both_ways(data.draw(edits(healthy(kind)[0])))


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_number_anywhere_is_said_or_changes_no_figure(kind):
    """In every field of a line, in the window and before it; a loss or a gradient norm that is not finite is invalid."""
    text, plan = healthy(kind)
    before = summary(text, plan)
    lines = [line for line in text.splitlines(keepends=True) if b"loss" in line and b"plan" not in line]
    for line in (lines[0], lines[len(lines) // 4], lines[-2]):
        at = text.index(line)
        for number in NUMBER.finditer(line):
            judged = re.search(rb"(loss|grad.norm)[:=] *$", line[: number.start()])
            for odd in some(ODD, number.start()):
                edited = text[: at + number.start()] + odd.encode() + text[at + number.end() :]
                log = read_both_ways(edited)
                if judged and odd in BEYOND:
                    assert log.invalid, (odd, line)
                said_or_harmless(before, summary(edited, plan), of_one_value(kind))


@pytest.mark.parametrize("put", [b"7", b".", b"-", b" ", b"e"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_word_spoils_no_other_line_and_no_other_log(kind, put):
    """In each of a line's words, in the first line and in the window."""
    text, plan = healthy(kind)
    before = summary(text, plan)
    lines = [line for line in text.splitlines(keepends=True) if b"loss" in line and b"plan" not in line]
    for line in (lines[0], lines[-2]):
        at = text.index(line)
        for word in some(re.finditer(rb"[A-Za-z_]{2,}", line), turn=at):
            for end in (word.start() + 1, word.start() + 2):  # put in, or in place of a letter
                edited = text[: at + word.start() + 1] + put + text[at + end :]
                read_both_ways(edited)
                said_or_harmless(before, summary(edited, plan), of_one_value(kind))
                assert summary(text, plan)._replace(log="") == before._replace(log="")


def test_a_log_without_gpu_hides_no_memory_of_another():
    """Its peak memory is 0, in words that are the same."""
    text, plan = healthy("ours")
    assert summary(re.sub(rb"(memory\w*): \d+", rb"\1: 0", text), plan).peak_memory_gib is None
    assert summary(text, plan).peak_memory_gib == pytest.approx(49)


def test_of_two_words_for_the_memory_the_one_that_does_not_say_0_counts():
    text, plan = healthy("ours")
    text = re.sub(rb"peak_memory_usage: \d+ \| memory_allocated", b"peak_memory_usage: 0 | max_memory_allocated", text)
    assert read_both_ways(text).steps[29].peak_memory == 34359738368
    assert summary(text, plan).peak_memory_gib == 32


def test_numbers_that_grow_much_from_one_line_to_the_next_are_read():
    text, _ = healthy("ours")
    long = b"1" + b"0" * (25)
    shorter = re.sub(rb"peak_memory_usage: \d+", b"peak_memory_usage: 1", text, count=1)
    steps = read_both_ways(re.sub(rb"peak_memory_usage: \d{2,}", b"peak_memory_usage: " + long, shorter)).steps
    assert (steps[0].peak_memory, steps[29].peak_memory) == (1, float(long))
