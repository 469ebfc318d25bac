"""A run that was saved, stopped, killed and resumed is one run, and its figures say what that cost."""

import json
import shutil
from pathlib import Path

import pytest

from ftgen.logs.find import find_runs
from ftgen.logs.read import read_log
from ftgen.results.summary import Summary, judge, summarize
from ftgen.show.curves import curves
from ftgen.show.report import read as read_report

CASE = Path(__file__).parents[1] / "logs" / "saved"
RUN = "logs/experiments/sft_nemo_tiny_llama_fp32_1/sft_nemo_tiny_llama_fp32_1_1795682126/sft_nemo_tiny_llama_fp32_1"
LOG = "log-local.sft_nemo_tiny_llama_fp32_1_1795682126_{}.out"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of the run, to change."""
    shutil.copytree(CASE / RUN, tmp_path / RUN)
    return tmp_path / RUN


def summary(folder: Path) -> Summary:
    (found,) = find_runs([folder])
    return summarize(found)


def test_three_attempts_are_one_run(run):
    found = summary(run)
    assert (found.status, found.steps, found.restarts, found.saves) == ("complete", 100, 2, 11)
    assert found.attempts == (
        "attempt 1: steps 0 to 28, 5% of 56 s useful",
        "attempt 2: steps 29 to 59, 18% of 17 s useful",
        "attempt 3: steps 60 to 99, 23% of 20 s useful",
    )
    assert found.total_time_s == 56 + 17 + 20
    assert found.tokens_trained == 100 * 4 * 256
    (of,) = find_runs([run])
    times = [time_s for _, time_s, _ in read_log(of).steps.curve()]
    assert found.goodput == pytest.approx(sum(times) / 93)
    assert found.save_time_s == pytest.approx(sum(map(float, saves(run))))
    assert found.save_share == pytest.approx(found.save_time_s / 93)


def saves(run: Path) -> list[str]:
    texts = [path.read_text() for path in run.glob("log-*.out")]
    return [line.split(" in ")[1].split()[0] for text in texts for line in text.splitlines() if "ftgen: saved step" in line]


def test_the_steps_that_a_kill_made_worthless_are_not_useful(run):
    text = (run / LOG.format(1)).read_text()
    assert "global_step: 63 " in text  # but the last save is of step 60: steps 60 to 63 were made twice
    lines = [line for line in text.splitlines(keepends=True) if not any(f"global_step: {n} " in line for n in range(60, 64))]
    before = summary(run)
    (run / LOG.format(1)).write_text("".join(lines))
    assert summary(run).goodput == before.goodput


def test_a_run_that_waits_for_its_next_attempt_is_incomplete_and_not_failed(run):
    for number in (1, 2):
        (run / LOG.format(number)).unlink()
    found = summary(run)
    assert found.status == "incomplete"
    assert found.reason.startswith("saved after step 29, to be run again; 29 of 100 steps")


def test_an_attempt_that_fails_before_its_first_step_takes_no_step_from_the_run(run):
    first = (run / LOG.format(1)).read_text().partition("ftgen: training")[0]
    (run / LOG.format(1)).write_text(first + "ftgen: error: no GPU\nftgen: exit status 1\n")
    (run / LOG.format(2)).unlink()
    found = summary(run)
    assert (found.status, found.steps) == ("failed", 29)
    assert "no GPU" in found.reason
    assert found.attempts[1].startswith("attempt 2: no step that counts")


def test_an_attempt_that_began_anew_counts_in_the_time_and_not_in_the_steps(run):
    (run / LOG.format(2)).unlink()
    (run / LOG.format(1)).unlink()
    again = (run / LOG.format(0)).read_text()
    (run / LOG.format(1)).write_text(again.replace("ftgen: exit status 85", "ftgen: exit status 1"))
    found = summary(run)
    assert found.steps == 29
    assert found.attempts[0].startswith("attempt 1: no step that counts")
    assert found.total_time_s == 2 * 56


def test_the_step_after_a_save_or_a_validation_is_not_timed(run):
    (of,) = find_runs([run])
    log = read_log(of)
    window = range(80, 100)
    counted = [log.steps[number].time_s for number in window if number not in {80, 90}]  # after saves
    assert 75 in log.history.interruptions  # after a validation
    assert judge(of, log, window=window).step_time_s == pytest.approx(sum(counted) / len(counted))
    assert "without 2 steps of the window" in "; ".join(judge(of, log, window=window).notes)
    only = judge(of, log, window=range(80, 81))
    assert only.step_time_s == log.steps[80].time_s  # there is no other


def test_the_last_validation_is_the_runs_and_all_of_them_make_a_curve(run):
    found = summary(run)
    assert (found.validation_loss, found.validation_step) == (4.888625, 100)
    (of,) = find_runs([run])
    log = read_log(of)
    assert curves(log.steps, log.history.validations).validation.points == [
        (25, 4.967238),
        (50, 4.950499),
        (75, 4.901109),
        (100, 4.888625),
    ]


def test_a_run_that_is_not_saved_has_none_of_these_figures(run):
    for log in run.glob("log-*.out"):
        log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "ftgen: " not in line))
    found = summary(run)
    assert (found.goodput, found.saves, found.validation_loss, found.attempts) == (None, None, None, ())


def test_the_report_has_a_validation_curve(run, ftgen, tmp_path):
    from ftgen.logs.find import find_runs
    from ftgen.results.keys import View
    from ftgen.show.report import report

    readings = read_report(find_runs([run]))
    page = "".join(report(readings, View([]), title="t"))
    assert "from 4.967 to 4.889 in 4 validations, lowest 4.889 after step 100" in page
    assert json.loads(ftgen("tabulate", run, "--format", "json").stdout)["runs"][0]["validation_loss"] == 4.888625


def test_watch_shows_the_validation_loss(run):
    from ftgen.show import watch
    from ftgen.show.follow import Follower

    (found,) = Follower([run], lambda: None).look()
    assert "validation loss 4.889" in watch.line(found)
    titles = [column.header for column in watch.table([found]).columns]
    assert titles == ["Run", "State", "", "Step", "Step time", "Loss", "Validation loss", "Left"]
