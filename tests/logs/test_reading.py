"""Reading logs that are large, many, packed, or in places where one does not expect them."""

import gzip
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from logs import make

from ftgen.errors import LogError
from ftgen.logs import blocks as blocks_module
from ftgen.logs import failures, many
from ftgen.logs.blocks import LogFileError, blocks
from ftgen.logs.find import find_runs, runs_below
from ftgen.logs.many import read_all
from ftgen.logs.read import read_log
from ftgen.results.summary import summarize, summarize_all
from ftgen.results.window import read_window

CASES = Path(__file__).parents[1] / "logs"
NAME = "sft_nemo_llama3_8b_bf16_8"


def log(folder, lines, name=NAME, run_id=1, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"log-a.{name}_{run_id}_0.out{suffix}"
    path.write_bytes(lines if isinstance(lines, bytes) else "".join(lines).encode())
    return path


def only(folder):
    (run,) = find_runs([folder])
    return summarize(run)


lines = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([b"\n", b"\r", b"\r\n"])), max_size=40)


@given(lines, st.sampled_from([b"", b"tail"]), st.integers(50, 90), st.integers(0, 9))
def test_blocks_are_all_of_a_file_once_from_any_line(tmp_path_factory, lines, tail, block, first):
    parts = [b"x" * length + end for length, end in lines] + [tail]
    data = b"".join(parts)
    start = len(b"".join(parts[:first]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "BLOCK", block)
        for suffix, packed in (("a", data), ("b", gzip.compress(data)), ("c", zstandard.compress(data))):
            path = tmp_path_factory.getbasetemp() / suffix
            path.write_bytes(packed)
            begin = start if suffix == "a" else 0  # compressed files are read from the beginning
            found = list(blocks(path, begin))
            assert b"".join(found) == data[begin:]
            assert all(one.endswith((b"\n", b"\r")) for one in found[:-1])


SAID = {
    "plan": b'ftgen plan: {"a": 1}',
    "environment": b'ftgen environment: {"python": "3.11"}',
    "node": b'ftgen node: {"node": "n1"}',
    "error": b"ftgen: error: no checkpoint",
    "exit": b"ftgen: exit status 3",
    "job exit": b"job exited with code 1",
    "task exit": b"srun: error: node1: task 3: Exited with exit code 1",
    "task killed": b"srun: error: node1: task 3: Killed",
    "exited": b"[exiting program at iteration 100] datetime: 2025-12-22",
    "stopped": b"`Trainer.fit` stopped: `max_steps=100` reached.",
    "done": b"[after training is done] datetime: 2025-12-22",
    "not finite": b"found NaN in local grad norm",
    "out of memory": b"[rank3]: torch.OutOfMemoryError: CUDA out of memory.",
    "host memory": b"slurmstepd: error: Detected 1 oom_kill event in StepId=7.0",
    "collective": b"Watchdog caught collective operation timeout: WorkNCCL",
    "cancelled": b"slurmstepd: error: *** STEP 608.0 ON n CANCELLED AT 2025 DUE TO TIME LIMIT ***",
    "killed": b"slurmstepd: error: *** JOB 608 ON n CANCELLED AT 2025 ***",
    "traceback": b"Traceback (most recent call last):",
}
noise = st.lists(
    st.sampled_from([b"words", b"[NeMo W ", b"`{*[", b"\0\xff", b"Exited", b"*** STEP", b"Traceback", b"x" * 99]), max_size=9
)


def test_each_kind_of_line_has_an_example():
    assert SAID.keys() == failures.KINDS.keys()


@given(st.sampled_from(sorted(SAID)), noise, noise)
def test_a_line_that_tells_is_found_in_any_text(kind, before, after):
    text = b"\n".join([*before, SAID[kind], *after])
    assert kind in {told.kind for told in failures.find(text)}
    assert failures.has_words(text, failures.WORDS_BETWEEN_STEPS) == failures.KINDS[kind].between_steps


def test_what_tells_is_found_in_a_talkative_log(tmp_path):
    steps = make.step_lines(400, 32, 1.32)
    talk = "[NeMo W nemo_logging:405] words {of} any *kind*\n" * 9
    log(tmp_path, [line + talk for line in steps] + ["[rank3]: torch.OutOfMemoryError: CUDA out of memory\n"])
    found = only(tmp_path)
    assert (found.steps, found.status) == (400, "ended-badly")


@pytest.mark.parametrize("block", [500, 5000, 1 << 20])
def test_what_the_run_survived_is_no_ending(tmp_path, monkeypatch, block):
    """A traceback that was handled, a step that was retried: the run went on."""
    monkeypatch.setattr(blocks_module, "BLOCK", block)
    steps = make.step_lines(100, 32, 1.32)
    trace = "[rank1]: Traceback (most recent call last):\n[rank1]:   File x\n[rank1]: ValueError: bad sample\n"
    log(tmp_path, [*steps[:40], trace, "CUDA out of memory, trying again\n", *steps[40:], "ftgen: exit status 0\n"])
    run = only(tmp_path)
    assert (run.status, run.reason, run.steps) == ("complete", None, 100)
    (found,) = find_runs([tmp_path])
    assert sorted(read_log(found).survived) == ["exception", "out of memory", "traceback"]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_few_steps_of_other_ranks_come_after_the_reason(tmp_path, after):
    steps = make.step_lines(100, 32, 1.32)
    log(tmp_path, [*steps[:40], "[rank1]: ValueError: x\n", "[rank1]: torch.OutOfMemoryError: y\n", *steps[40 : 40 + after]])
    run = only(tmp_path)
    assert (run.status, "torch.OutOfMemoryError: y (rank 1, line 42)" in run.reason) == ("failed", True)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_packed_log_reads_like_the_plain_one(tmp_path, pack):
    lines = "".join(make.step_lines(100, 32, 1.32)).encode()
    log(tmp_path / "plain", lines)
    log(tmp_path / "packed", pack(lines[:9000]) + pack(lines[9000:]), suffix=".gz")
    plain, packed = only(tmp_path / "plain"), only(tmp_path / "packed")
    assert (packed.step_time_s, packed.status, packed.warnings) == (plain.step_time_s, "complete", ())


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress])
def test_a_packed_log_that_is_damaged_is_read_up_to_there(tmp_path, pack):
    packed = pack(os.urandom(300_000) + b"\n" + "".join(make.step_lines(100, 32, 1.32)).encode())
    log(tmp_path, packed[:-20], suffix=".gz")
    assert "the log is cut off: its compressed data has no end" in only(tmp_path).reason
    log(tmp_path, packed[:1000] + b"0123456789" * 9 + packed[1090:], suffix=".gz")
    assert only(tmp_path).status == "incomplete"


def test_a_zstd_log_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    log(tmp_path, zstandard.compress(b"words\n"), suffix=".zst")
    assert "pip install zstandard" in only(tmp_path).reason


def test_several_processes_find_what_one_does(monkeypatch):
    monkeypatch.setattr(many, "ALONE", 2000)
    runs = list(runs_below([CASES]))
    seen = []
    found = summarize_all(runs, processes=2, progress=seen.append)
    assert repr(found) == repr(summarize_all(runs, processes=1))
    logs = Counter(each.log for each in found)  # of a file with several runs, `summarize` has the last one only
    alone = [each for each in found if logs[each.log] == 1]
    assert repr(alone) == repr([summarize(run) for run in find_runs([CASES]) if logs[run.log] == 1])
    assert sum(seen) == sum(run.size for run in runs)


def killed(run, log):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_told_of(monkeypatch):
    """As the kernel does where memory runs out."""
    monkeypatch.setattr(many, "ALONE", 2000)
    with pytest.raises(LogError, match="a process that read logs was killed"):
        read_all(runs_below([CASES]), killed, processes=2)


def test_the_steps_of_a_long_log_are_there_in_full(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK", 5000)
    monkeypatch.setattr("ftgen.logs.steps.KEPT", 35)
    log(tmp_path, make.step_lines(400, 32, 1.32))
    (run,) = find_runs([tmp_path])
    steps = read_log(run).steps
    assert list(steps) == list(range(400)) == [round(12 - step.loss, 1) * 10 for step in steps.values()]
    assert summarize(run, window=read_window("3-9")).step_time_s == pytest.approx((2 * 3.96 + 2 * 1.31 + 3 * 1.33) / 7)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak memory")
def test_memory_does_not_grow_with_the_log(tmp_path):
    code = (
        "import re, sys; from ftgen.logs.find import runs_below; from ftgen.results.summary import summarize_all;"
        "print(summarize_all(runs_below(sys.argv[1:]), processes=1)[0].steps);"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    peaks = []
    for name, steps in (("short", 1000), ("long", 300_000)):
        path = log(tmp_path / name, make.step_lines(steps, 32, 1.32))
        found = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        there, peak = map(int, found.stdout.split())
        assert there == steps
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 24 << 10, f"{peaks} KiB"  # 75 MB are read, of which the last 8 are kept


def test_interleaved_ranks_give_the_slowest(tmp_path):
    ranks = [make.labelled(make.step_lines(100, 32, mean_s), rank) for rank, mean_s in enumerate((1.30, 1.32, 1.31))]
    log(tmp_path / "line by line", [line for together in zip(*ranks, strict=True) for line in together])
    log(tmp_path / "one after the other", [line for rank in ranks for line in rank])
    assert {summarize(run).step_time_s for run in find_runs([tmp_path])} == {1.32}


def test_a_second_attempt_after_a_head_line_counts_alone(tmp_path):
    head = f"ftgen plan: {make.json.dumps(make.json.loads(make.plan('sft', 'bf16', 8, 25).to_json()))}\n"
    log(tmp_path, [head, *make.step_lines(25, 32, 9.0), "words\n", head, *make.step_lines(25, 32, 1.32)])
    run = only(tmp_path)
    assert (run.step_time_s, run.restarts, run.notes) == (
        1.32,
        1,
        ("the log has 2 attempts; only the steps of the last one count",),
    )


def test_what_is_passed_over_is_said(tmp_path, monkeypatch):
    log(tmp_path / "good", make.step_lines(25, 32, 1.32))
    os.mkfifo(tmp_path / "log-a.x_2_0.out")
    (tmp_path / "log-a.x_3_0.out").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good" / "up").symlink_to(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir()
    real = os.scandir

    def scandir(path):  # root may read what nobody else may
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(closed))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    told = []
    assert len(find_runs([tmp_path], told.append)) == 1
    assert sorted(text.removeprefix(f"{tmp_path}/") for text in told) == [
        "closed: cannot be read: Permission denied: runs in it are not counted",
        "log-a.x_2_0.out: passed over: it is not a file",
        "log-a.x_3_0.out: passed over: No such file or directory",
    ]


def test_a_path_that_is_not_there_is_an_error_beside_good_ones(tmp_path):
    log(tmp_path, make.step_lines(25, 32, 1.32))
    with pytest.raises(LogError, match=r"there is no .*/nowhere"):
        find_runs([tmp_path, tmp_path / "nowhere"])


def test_a_pipe_in_a_logs_place_does_not_hang(tmp_path):
    log(tmp_path, make.step_lines(25, 32, 1.32))
    (run,) = find_runs([tmp_path])
    Path(run.log).unlink()
    os.mkfifo(run.log)
    assert "cannot be read: it is not a file" in summarize(run).reason
    with pytest.raises(LogFileError):
        list(blocks(run.log))


@pytest.mark.parametrize("name", ["a\nb", "[red]x", "\x1b[31mred", "<script>", "=1+1", os.fsdecode(b"\xff\xfe")])
def test_a_name_is_a_name_whatever_is_in_it(tmp_path, name):
    log(tmp_path / name, make.step_lines(25, 32, 1.32), name=name)
    run = only(tmp_path)
    assert (run.experiment, run.step_time_s) == (name, 1.32)


@pytest.mark.parametrize(("text", "window"), [("20", 20), (" 5 ", 5), ("80-99", range(80, 100)), ("7-7", range(7, 8))])
def test_windows_are_counts_or_ranges(text, window):
    assert read_window(text) == window


@pytest.mark.parametrize("text", ["0", "9-3", "-5", "5-", "x", "1.5", "1-2-3", ""])
def test_no_other_windows(text):
    with pytest.raises(LogError, match="window"):
        read_window(text)


def test_a_bar_and_lines_of_the_same_steps_count_as_lines(tmp_path):
    seconds = make.times(1.32)
    both = [
        make.bar(step, 25, 32, seconds[step] * 1.01) + "\r" + make.step_line(step, 24, 32, seconds[step])
        for step in range(25)
    ]
    log(tmp_path, both)
    assert only(tmp_path).step_time_s == 1.32


@pytest.mark.parametrize(
    "text",
    [
        "Traceback (most recent call last):\n" * 20_000,
        ("Traceback (most recent call last):\n" + "a.b" * 30_000 + "\n") * 30,
        "*** STEP " * 20_000 + "\n",
        "[" * 2_000_000 + "\n",
        "\x1b[" * 500_000 + "\n",
        "x" * 3_000_000 + "\n",
        "words\n" * 1_000_000,
    ],
    ids=["tracebacks", "long names", "cancelled", "brackets", "escapes", "a long line", "a million lines"],
)
def test_no_text_keeps_the_reader_busy_or_hides_the_steps(tmp_path, text):
    log(tmp_path, text + "".join(make.step_lines(25, 32, 1.32)))
    assert only(tmp_path).step_time_s == 1.32


def test_the_benchmark_finds_that_a_plain_parser_agrees(tmp_path):
    bench = Path(__file__).parents[2] / "bench" / "reading.py"
    command = [sys.executable, bench, "--scale", "0.001", "--rounds", "1", "--output", tmp_path / "result.json"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert table.count(" MiB |\n") == 3
    assert make.json.loads((tmp_path / "result.json").read_text())["cores"] >= 1
