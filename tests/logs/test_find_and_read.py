"""Finding and reading logs: names, places, damaged bytes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftgen.errors import LogError
from ftgen.logs import blocks
from ftgen.logs.feed import feed
from ftgen.logs.find import find_runs
from ftgen.logs.identity import from_name, from_plan
from ftgen.logs.log import Log
from ftgen.logs.read import read_log
from ftgen.results.summary import summarize

CASES = Path(__file__).parents[1] / "logs"
WHOLE = next(path for path in (CASES / "documented").rglob("log-*.out") if "sft_nemo_llama3_8b_bf16" in path.name)
LINE = (
    b"Training epoch 0, iteration 7/99 | lr: 4.491e-06 | global_batch_size: 32 | global_step: 7 | "
    b"reduced_train_loss: 12.81 | train_step_timing in s: 2.693 | consumed_samples: 256\n"
)


def read(text):
    log = Log(from_name("x"))
    feed(log, text)
    return log


def put(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(LINE)


@pytest.mark.parametrize(
    ("place", "experiment", "run_id"),
    [
        ("lora_nemo_llama3_8b_fp8_8/log-a.lora_nemo_llama3_8b_fp8_8_5_0.out", "lora_nemo_llama3_8b_fp8_8", "5"),
        ("flat/log-acct-part.sft_nemo_llama3_8b_bf16_32_77_0.out", "sft_nemo_llama3_8b_bf16_32", "77"),
        ("sft_nemo_llama3_8b_bf16_32/x/log-renamed_8_0.out", "sft_nemo_llama3_8b_bf16_32", "8"),
        ("my.own/log-acct.my.own_8_0.out", "my.own", "8"),
        ("flat/log-acct.other_8_0.out", "other", "8"),
    ],
)
def test_a_run_is_known_by_its_place(tmp_path, place, experiment, run_id):
    put((tmp_path / place).parent, Path(place).name)
    (run,) = find_runs([tmp_path])
    assert (run.experiment, run.run_id) == (experiment, run_id)


def test_other_files_are_no_logs(tmp_path):
    put(tmp_path, "log-a.x_1_0.err", "plan.json", "report.html", "results.csv", ".hidden", "train.py")
    (tmp_path / "log-x.out").write_text("words\n" * 99)
    (tmp_path / "weights").write_bytes(b"\0" * 99 + LINE)
    with pytest.raises(LogError, match=r"no run found below .*log-<account>.* \(1 other file without step lines\)"):
        find_runs([tmp_path])


def test_nothing_found_names_every_place(tmp_path):
    with pytest.raises(LogError) as error:
        find_runs([tmp_path / "a", tmp_path / "b"])
    assert str(tmp_path / "a") in str(error.value)
    assert str(tmp_path / "b") in str(error.value)


def test_a_file_that_is_asked_for_is_read_whatever_its_name(tmp_path):
    put(tmp_path, "slurm-1.out")
    (run,) = find_runs([tmp_path / "slurm-1.out"])
    assert read_log(run).steps[7].time_s == 2.693


def test_a_log_counts_once_however_often_it_is_reached(tmp_path):
    put(tmp_path / "x", "log-a.x_1_0.out")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "loop").symlink_to(tmp_path)
    assert len(find_runs([tmp_path, tmp_path / "x", tmp_path / "y", tmp_path / "x" / "log-a.x_1_0.out"])) == 1


def test_pipes_and_dead_links_are_passed_over(tmp_path):
    put(tmp_path, "log-a.x_1_0.out")
    os.mkfifo(tmp_path / "log-a.x_2_0.out")
    (tmp_path / "log-a.x_3_0.out").symlink_to(tmp_path / "nowhere")
    assert [run.run_id for run in find_runs([tmp_path])] == ["1"]


def test_the_highest_restart_counts_as_a_number(tmp_path):
    put(tmp_path, "log-a.x_1_9.out", "log-a.x_1_10.out", "log-a.x_1_0.out")
    (run,) = find_runs([tmp_path])
    assert (Path(run.log).name, run.restart, len(run.earlier)) == ("log-a.x_1_10.out", 10, 2)


def test_a_plan_beside_logs_of_several_runs_is_none_of_theirs(tmp_path):
    put(tmp_path, "log-a.x_1_0.out", "plan.json")
    assert [run.plan for run in find_runs([tmp_path])] == [tmp_path / "plan.json"]
    put(tmp_path, "log-a.y_2_0.out")
    assert [run.plan for run in find_runs([tmp_path])] == [None, None]


def test_a_log_that_cannot_be_read_is_a_run_all_the_same(tmp_path):
    put(tmp_path, "log-a.x_1_0.out")
    (run,) = find_runs([tmp_path])
    Path(run.log).unlink()
    summary = summarize(run)
    assert summary.status == "incomplete"
    assert "cannot be read: No such file" in summary.reason


@pytest.mark.parametrize(
    ("change", "time_s"),
    [
        ((b"2.693", b"2"), 2.0),
        ((b"2.693", b"1.2e+03"), 1200.0),
        ((b"2.693", b"nan"), None),
        ((b"2.693", b"inf"), None),
        ((b"2.693", b"infinity"), None),
        ((b"2.693", b"1e999"), None),
        ((b"2.693", b"0"), None),
        ((b"2.693", b"2.6.9"), None),
        ((b"2.693", b""), None),
        ((b"2.693", b"\x1b[1m2.6\x1b[0m93\x1b[K"), 2.693),
        ((b"2.693", b"2\x1b]8;;http://x\x07.7"), 2.7),
        ((b"2.693", b"-1"), None),
        ((b"reduced_train_loss: 12.81 | ", b""), 2.693),
        ((b" | consumed_samples: 256", b""), 2.693),
        ((b"Training", b"\r12: \x1b[0mTraining"), 2.693),
        ((b"\n", b"\r\n"), 2.693),
    ],
)
def test_a_step_line_in_its_forms(change, time_s):
    assert read(LINE.replace(*change)).steps[7].time_s == time_s


@pytest.mark.parametrize("value", [b"2.6Training epoch", b"1_0", b"0x1", b"infinit", b"2.6\x00"])
def test_a_value_that_is_no_number_is_no_step(value):
    assert not read(LINE.replace(b"2.693", value)).steps


def test_a_value_that_was_cut_off_is_no_value():
    end = LINE.index(b"2.693")
    assert not any(read(LINE[:cut]).steps for cut in range(end + 6))
    assert read(LINE[: end + len(b"2.693 |")]).steps[7].time_s == 2.693


def test_two_lines_run_together_are_neither():
    assert not read(LINE.rstrip() + LINE).steps
    assert not read(LINE[:50] + LINE).steps
    lines = [LINE.replace(b"p: 7 |", b"p: %d | max_memory_reserved: 9 |" % step) for step in range(12)]
    log = read(b"".join([*lines[:6], lines[6].partition(b"reduced")[0], *lines[7:]]))
    assert (sorted(log.steps), log.damaged) == ([0, 1, 2, 3, 4, 5, 8, 9, 10, 11], 1)


def test_the_slowest_rank_gives_a_step_its_time_in_any_order():
    lines = [b"0: " + LINE, b"1: " + LINE.replace(b"2.693", b"3"), b"2: " + LINE.replace(b"2.693", b"nan")]
    assert dict(read(b"".join(lines)).steps) == dict(read(b"".join(lines[::-1])).steps)
    assert read(b"".join(lines)).steps[7].time_s == 3.0


@pytest.mark.parametrize("change", [(b"2.693", b"2..693"), (b"n 7/99", b"n 7-9/99"), (b"12.81", b"12..81")])
def test_a_first_line_that_is_damaged_spoils_no_other(change):
    lines = [LINE.replace(*change), *(LINE.replace(b"p: 7", b"p: %d" % step) for step in range(8, 30))]
    steps = read(b"".join(lines)).steps
    assert {step[:2] + step[7:8] for number, step in steps.items() if number > 7} == {(2.693, 12.81, 100)}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_no_number_makes_the_run_invalid(tmp_path, value):
    text = WHOLE.read_text().replace("reduced_train_loss: 11.8", f"reduced_train_loss: {value}")
    (tmp_path / "log-a.x_1_0.out").write_text(text)
    (summary,) = map(summarize, find_runs([tmp_path]))
    assert (summary.status, summary.step_time_s) == ("invalid", None)
    assert f"reduced_train_loss is {value} at step 2" in summary.reason


def test_blocks_end_where_lines_do(monkeypatch):
    runs = find_runs([CASES])
    whole = [read_log(run) for run in runs]
    monkeypatch.setattr(blocks, "BLOCK", 4096)
    assert repr([read_log(run) for run in runs]) == repr(whole)  # there is a NaN in it


@pytest.mark.parametrize(
    "text", ["", "[]", "nul", "{", "[" * 10_000, '{"gpus": ' + "9" * 5000 + "}", '{"gpus": NaN}', b"\xff\xfe\xfd"]
)
def test_a_broken_plan_is_a_problem_and_no_crash(text):
    with pytest.raises(LogError, match="plan"):
        from_plan(text, "plan.json")


def test_every_problem_of_a_plan_is_told():
    plan = json.loads(next(CASES.rglob("plan.json")).read_text())
    plan["gpu"] = {"name": 7, "peak_flops": float("inf")}
    plan["seq_length"] = True
    with pytest.raises(LogError) as error:
        from_plan(json.dumps(plan), "plan.json")
    assert [problem.where for problem in error.value.problems] == [("gpu", "name"), ("seq_length",), ("gpu", "peak_flops")]


def figures(text):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "log-a.x_1_0.out").write_bytes(text)
        (summary,) = map(summarize, find_runs([folder]))
    return summary.status, summary.step_time_s


@given(cut=st.integers(0, WHOLE.stat().st_size))
@settings(deadline=None, max_examples=60)
def test_a_log_cut_anywhere_is_not_taken_for_a_whole_one(cut):
    text = WHOLE.read_bytes()
    status, time_s = figures(text[:cut])
    assert (status, time_s) == figures(text) or status == "incomplete"


@given(st.binary(max_size=200), st.integers(0, WHOLE.stat().st_size), st.booleans())
@settings(deadline=None, max_examples=60)
def test_no_bytes_make_the_reader_fail(junk, at, only):
    text = WHOLE.read_bytes()
    status, _ = figures(junk if only else text[:at] + junk + text[at:])
    assert status in {"complete", "incomplete", "failed", "invalid"}


def test_reading_logs_imports_nothing_heavy():
    code = "import sys, ftgen.results.summary, ftgen.show.formats; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydantic", "numpy", "pandas", "rich", "torch", "nemo"} & set(modules)


TIMES = [f"2025-12-22 15:{minute:02}:33" for minute in range(40)]
BARE_LINE = "Training epoch 0, iteration {0}/39 | global_step: {0} | reduced_train_loss: 9.5 | train_step_timing in s: 2.5\n"
MEGATRON_LINE = " [{1}] iteration {2:8}/      40 | elapsed time per iteration (ms): 2500.0 | lm loss: 9.5E+00 |\n"


@pytest.mark.parametrize(
    ("line", "before", "told"),
    [
        (MEGATRON_LINE, "", (TIMES[0], TIMES[-1])),
        ("{1} " + BARE_LINE, "", (TIMES[0], TIMES[-1])),
        (BARE_LINE, "", (None, None)),
        (BARE_LINE, "begins at 2025-12-22T15:00:33\n", ("2025-12-22 15:00:33", None)),  # at the end no line does
    ],
)
def test_times_are_found_wherever_lines_tell_them(tmp_path, line, before, told):
    path = tmp_path / "log-a.x_1_0.out"
    path.write_text(before + "".join(line.format(step, time, step + 1) for step, time in enumerate(TIMES)))
    (run,) = find_runs([tmp_path])
    log = read_log(run)
    assert len(log.steps) == 40
    assert tuple(str(time) if time else None for time in (log.started, log.ended)) == told


@pytest.mark.parametrize("label", ["", "1: ", "[rank1]: ", "[rank 1 on node-7.example] "])
def test_an_exception_is_known_behind_every_label(label):
    lines = ("Traceback (most recent call last):", '  File "x.py", line 1, in <module>', "IndexError: out of range")
    found = read("".join(f"{label}{line}\n" for line in lines).encode()).at_end["exception"]
    assert (found.note, found.rank) == ("IndexError: out of range", 1 if label else None)


@pytest.mark.parametrize("given", ["logs/logs.tar.gz", "logs"])
def test_an_archive_of_logs_is_refused_by_name(given, ftgen):
    done = ftgen("tabulate", given, cwd=CASES / "people" / "37_tarball")
    assert (done.returncode, done.stdout) == (1, "")
    assert "logs/logs.tar.gz is an archive" in done.stderr
    assert "unpack it" in done.stderr


def test_several_runs_in_one_file_are_several_rows(ftgen):
    done = ftgen("tabulate", "logs", "--format", "json", cwd=next((CASES / "people").glob("41_*")))
    assert [run["run_id"] for run in json.loads(done.stdout)["runs"]] == ["500#1", "500#2", "500#3"]
