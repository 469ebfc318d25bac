"""The history: runs are kept once, by several writers, and what changed in them is found."""

import errno
import fcntl
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from ftgen.errors import LogError
from ftgen.results.history import Added, History
from ftgen.results.past import past
from ftgen.results.record import from_lines, key, to_lines
from ftgen.results.trend import change_points, series

ROOT = Path(__file__).parents[2]
H100 = ROOT / "tests" / "logs" / "h100"
REAL = [ROOT / "tests" / "logs" / name for name in ("h100", "h200", "h200_pair", "h200_parallel")]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A history of every run on a GPU whose log is a case."""
    file = tmp_path_factory.mktemp("history") / "all.sqlite"
    command = [sys.executable, "-m", "ftgen", "history", "add", *map(str, REAL), "--history", str(file)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return History(file)


def repeats(record, times_s, *, start=1, **environment):
    """Runs of the same work with other step times."""
    made = []
    for number, time_s in enumerate(times_s, start):
        results = record["results"] | {
            "run_id": str(1000 + number),
            "started": f"2026-10-{1 + number // 24:02}T{number % 24:02}:00:00",
            "step_time_s": time_s,
        }
        made.append({**record, "results": results, "environment": {**record["environment"], **environment}})
    return made


def fp8_default(history):
    (found,) = [of for of in history.records() if of["results"]["run_id"] == "1795387558"]
    return found


def test_a_run_is_kept_once(ftgen, tmp_path):
    file = tmp_path / "a.sqlite"
    first = ftgen("history", "add", H100, "--history", file)
    assert first.stdout == f"{file}: 4 new, 0 changed, 0 unchanged\n"
    assert ftgen("history", "add", H100, "--history", file).stdout == f"{file}: 0 new, 0 changed, 4 unchanged\n"


def test_a_run_that_went_on_is_replaced(ftgen, tmp_path):
    logs = tmp_path / "logs"
    shutil.copytree(H100, logs)
    log = next(logs.rglob("log-*_1795387558_0.out"))
    whole = log.read_bytes()
    log.write_bytes(whole[: whole.index(b"global_step: 40 ")])
    file = tmp_path / "a.sqlite"
    ftgen("history", "add", logs, "--history", file)
    log.write_bytes(whole)
    assert "0 new, 1 changed, 3 unchanged" in ftgen("history", "add", logs, "--history", file).stdout
    assert len(History(file).records()) == 4


def test_the_default_file_is_below_stage_path(ftgen, tmp_path, monkeypatch):
    monkeypatch.setenv("STAGE_PATH", str(tmp_path))
    assert ftgen("history", "add", H100).returncode == 0
    assert (tmp_path / "ftgen.sqlite").is_file()
    monkeypatch.delenv("STAGE_PATH")
    done = ftgen("history", "list")
    assert (done.returncode, "--history FILE" in done.stderr) == (2, True)


def test_several_writers_lose_nothing(real, tmp_path):
    file, record = tmp_path / "a.sqlite", fp8_default(real)
    for writer in range(4):
        lines = to_lines(repeats(record, [0.5] * 25, start=25 * writer))
        (tmp_path / f"{writer}.jsonl").write_text("".join(lines))
    words = [sys.executable, "-m", "ftgen", "history", "import", "--history", str(file)]
    writers = [subprocess.Popen([*words, str(tmp_path / f"{writer}.jsonl")], cwd=ROOT) for writer in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert len(History(file).records()) == 100


def test_files_can_be_merged(ftgen, real, tmp_path):
    lines, merged = tmp_path / "a.jsonl", tmp_path / "merged.sqlite"
    assert ftgen("history", "export", "--history", real.path, "--output", lines).returncode == 0
    for _ in range(2):
        assert ftgen("history", "import", lines, "--history", merged).returncode == 0
    assert sorted(to_lines(History(merged).records())) == sorted(to_lines(real.records()))


def test_a_line_that_is_no_record_is_named_and_nothing_is_added(ftgen, tmp_path):
    lines, file = tmp_path / "a.jsonl", tmp_path / "a.sqlite"
    lines.write_text(
        '{"format": 1, "results": {}, "plan": null, "environment": null, "log_sha256": ""}\nnothing\n{"format": 7}\n'
    )
    done = ftgen("history", "import", lines, "--history", file)
    assert done.returncode == 1
    for number, said in ((1, "no experiment, run_id or started"), (2, "is no record of ftgen history"), (3, '"format": 1')):
        assert f"{lines}:{number}: " in done.stderr
        assert said in done.stderr
    assert not file.exists()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("no database, but longer than the head of one " * 10)
    later = sqlite3.connect(tmp_path / "later")
    later.execute("PRAGMA user_version = 99")
    later.close()
    for name, said in (("text", "is no SQLite file"), ("later", "written by a later ftgen"), ("none", "no such history")):
        with pytest.raises(LogError, match=said):
            History(tmp_path / name).records()


def test_a_file_system_without_locks_is_refused(real, tmp_path, monkeypatch):
    """No file system of a test machine lacks locks: the kernel's answer on one that does is put in its place."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(LogError, match="cannot lock") as raised:
        History(tmp_path / "a.sqlite").add([fp8_default(real)])
    assert "on a local disk" in str(raised.value)


def test_conditions_select_runs(ftgen, real):
    def listed(*conditions):
        return ftgen("history", "list", *conditions, "--history", real.path).stdout.splitlines()[1:]

    assert len(listed("gpu=h100")) == 4
    assert len(listed("gpu=h100", "precision=fp8")) == 2
    assert len(listed("plan.data.packed=false", "status=complete")) == 2
    assert listed("environment.packages.nemo_toolkit=2.6.0") == []
    done = ftgen("history", "list", "gpx=h100", "--history", real.path)
    assert (done.returncode, "unknown key gpx" in done.stderr) == (2, True)


def test_a_run_is_shown_with_plan_and_environment(ftgen, real):
    shown = json.loads(ftgen("history", "show", "1795387558", "--history", real.path).stdout)
    assert shown["results"]["step_time_s"] == pytest.approx(0.5582, abs=1e-4)
    assert shown["plan"]["precision"] == "fp8"
    assert shown["environment"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert ftgen("history", "show", "1", "--history", real.path).returncode == 1


def test_a_planted_regression_is_found_with_its_cause_and_nothing_else(ftgen, real, tmp_path):
    record, noise = fp8_default(real), Random(1)
    before = repeats(record, [noise.gauss(0.56, 0.004) for _ in range(12)])
    after = repeats(record, [noise.gauss(0.585, 0.004) for _ in range(8)], start=13, driver="590.1")
    history = History(tmp_path / "a.sqlite")
    history.add([*real.records(), *before, *after])
    changed = [(of, change) for of in series(history.records()) for change in of.changes]
    ((of, change),) = changed
    assert of.work["gpu"] == "h100"
    assert change.run_id == "1013"
    assert change.ratio == pytest.approx(0.585 / 0.56, abs=0.01)
    assert change.versions == ("driver 580.159.04 -> 590.1",)
    done = ftgen("history", "trend", "gpu=h100", "--history", history.path, "--fail-on-change")
    assert done.returncode == 1
    assert "slower by 4." in done.stdout
    assert "changed there: driver 580.159.04 -> 590.1" in done.stdout


@pytest.mark.parametrize("spread", [0.005, 0.02])
def test_noise_is_hardly_ever_called_a_change(spread):
    """At most 2% of series without a change have one found; bench/trend.py simulates more of them."""
    found = 0
    for seed in range(100):
        noise = Random(seed)
        found += bool(change_points([noise.gauss(1, spread) for _ in range(20)]))
    assert found <= 2


def test_one_outlier_is_no_change():
    assert (
        change_points([1.0 + 0.001 * (at % 5) for at in range(10)] + [1.4] + [1.0 + 0.001 * (at % 5) for at in range(10)])
        == []
    )


@pytest.mark.parametrize(("which", "time_s"), [("median", 0.56), ("best", 0.55), ("last", 0.57)])
def test_the_history_is_a_baseline(real, which, time_s):
    record = fp8_default(real)
    runs = repeats(record, [0.56, 0.55, 0.57])
    (figures,) = past(runs, which).figures.values()
    assert figures.step_time_s == pytest.approx(time_s)


def test_a_regression_beside_the_history_is_a_difference_beyond_noise(ftgen, real, tmp_path):
    quiet, loud = History(tmp_path / "quiet.sqlite"), History(tmp_path / "loud.sqlite")
    record = fp8_default(real)
    quiet.add(repeats(record, [0.540, 0.541, 0.540, 0.541, 0.5405]))
    loud.add(repeats(record, [0.50, 0.58, 0.52, 0.56, 0.54]))
    for history, code in ((quiet, 1), (loud, 0)):
        words = ["--baseline", "history", "--history", history.path, "--fail-on", "regression"]
        done = ftgen("tabulate", H100, *words)
        assert done.returncode == code, done.stderr
    assert (
        "1.033x, 1.005x is allowed"
        in ftgen("tabulate", H100, "--baseline", "history", "--history", quiet.path, "--fail-on", "regression").stderr
    )


def test_a_run_is_not_compared_with_itself(ftgen, real):
    done = ftgen("tabulate", H100, "--baseline", "history:last", "--history", real.path)
    assert "nothing could be compared" in done.stderr


def test_a_record_survives_the_way_through_a_line(real):
    (record,) = from_lines("".join(to_lines([fp8_default(real)])), "a.jsonl")
    assert key(record) == key(fp8_default(real))
    assert History(real.path).add([record]) == Added(0, 0, 1)
