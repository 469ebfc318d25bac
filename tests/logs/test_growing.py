"""Logs that grow, are cut short or replaced between two looks: each look says what a fresh read would say."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logs import make

from ftgen.logs import blocks, feed
from ftgen.logs.find import find_runs
from ftgen.logs.read import Growing, read_log
from ftgen.results.summary import judge
from ftgen.show.follow import Follower

CASES = Path(__file__).parents[1] / "logs"
NAME = "sft_nemo_llama3_8b_bf16_8"
HEAD = f"ftgen plan: {make.json.dumps(make.json.loads(make.plan('sft', 'bf16', 8, 25).to_json()))}\n"
TRACE = "[rank1]: Traceback (most recent call last):\n[rank1]:   File x\n[rank1]: ValueError: the loader is empty\n"


def texts():
    """Logs of all makes, whole, with other attempts, bars, colours, ends and damage in them."""
    found = [Path(run.log).read_bytes() for run in find_runs([CASES]) if run.log.endswith(".out")]
    steps = make.step_lines(60, 32, 1.32)
    bars = [make.bar(step, 60, 32, 1.32) for step in range(60)]
    made = [
        [HEAD, *steps[:30], TRACE, HEAD, *steps, *make.ended()],
        [text + end for text, end in zip(bars * 2, ["\r", "\r\n", "\n", "\r"] * 30, strict=True)],
        [line + "words\n" * (number % 5) + TRACE * (number % 9 == 8) for number, line in enumerate(steps)],
        [line.replace("\n", "\r\n") for line in steps],
        [line for step in range(60) for line in make.megatron(step, 60, 32, 1.32, 736)],
        [*steps[4::5], "x" * 3000, *steps],
    ]
    return [*filter(None, found), *("".join(lines).encode() for lines in made)]


TEXTS = texts()


def numbered(log):
    """Everything that a log says."""
    return repr(log)


any_text = st.sampled_from(TEXTS[-6:]) | st.sampled_from(TEXTS)
changes = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 40) | st.integers(1, 6000)),
    st.tuples(st.sampled_from(["cut", "replace", "rewrite"]), st.integers(0, 6000)),
)


@given(st.data(), any_text, any_text, st.sampled_from([64, 500, 2000, 1 << 17]))
def test_each_look_says_what_a_fresh_read_would(tmp_path_factory, data, text, other, block):
    folder = tmp_path_factory.mktemp("log")
    path = folder / f"log-a.{NAME}_1_0.out"
    path.write_bytes(b"")
    (run,) = find_runs([folder])
    reader, there = Growing(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        patch.setattr(feed, "EDGE", block)
        for change, size in data.draw(st.lists(changes, min_size=3, max_size=12)):
            if change == "add":
                with path.open("ab") as file:
                    file.write(text[there : there + size])
                there += size
            else:
                there = min(size, there) if change == "cut" else size
                text = text if change == "cut" else other
                if change == "replace":
                    path.unlink()
                path.write_bytes(text[:there])
            log, fresh = reader.read(run), read_log(run)
            assert judge(run, log) == judge(run, fresh)
            assert numbered(log) == numbered(fresh)


@pytest.mark.parametrize("end", [TRACE, "".join(make.ended()), HEAD + TRACE, make.bar(40, 60, 32, 1.32) + "\r\n"])
@pytest.mark.parametrize("piece", [1, 7, 50])
def test_lines_that_come_in_pieces_say_what_they_say_by_then(tmp_path, monkeypatch, end, piece):
    monkeypatch.setattr(blocks, "BLOCK", 2000)
    path = tmp_path / f"log-a.{NAME}_1_0.out"
    text = "".join(make.step_lines(40, 32, 1.32))
    path.write_text(text)
    (run,) = find_runs([tmp_path])
    reader = Growing()
    for there in range(0, len(end) + piece, piece):
        path.write_bytes((text + end[:there]).encode())
        log, fresh = reader.read(run), read_log(run)
        assert judge(run, log) == judge(run, fresh)
        assert numbered(log) == numbered(fresh)


def test_the_log_that_was_given_is_not_changed_by_the_next_look(tmp_path):
    path = tmp_path / f"log-a.{NAME}_1_0.out"
    lines = make.step_lines(2000, 32, 1.32)
    path.write_text("".join(lines[:1500]))
    (run,) = find_runs([tmp_path])
    reader = Growing()
    first = reader.read(run)
    before = numbered(first)
    path.write_text("".join([*lines, TRACE]))
    reader.read(run)
    assert numbered(first) == before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="asks Linux how much was read")
def test_a_look_reads_what_was_added_and_no_more_than_a_block_besides(tmp_path):
    path = tmp_path / f"log-a.{NAME}_1_0.out"
    lines = make.step_lines(101_000, 32, 1.32, planned=200_000)
    path.write_text("".join([*lines[:100_000], "[rank0]: torch.OutOfMemoryError: CUDA out of memory\n"]))

    def looked():
        before = int(Path("/proc/self/io").read_text().split()[1])
        (run,) = follower.look()
        return run.run, int(Path("/proc/self/io").read_text().split()[1]) - before

    follower = Follower([tmp_path], queue=lambda: None)
    run, size = looked()
    assert size > path.stat().st_size > 10 << 20
    assert f"line {100_001}" in run.reason
    for start in range(100_000, 101_000, 250):
        with path.open("a") as file:
            file.write("".join(lines[start : start + 250]))
        run, size = looked()
        assert run.steps == start + 250
        assert size < 400_000
    assert looked()[1] < 5_000  # nothing was added
    with path.open("a") as file:
        file.write("[rank0]: torch.OutOfMemoryError: CUDA out of memory\n")
    assert f"line {101_002}" in looked()[0].reason
