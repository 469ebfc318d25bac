"""Runs beside a baseline: what was published, and a file of results."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import summary_of

from ftgen import catalogue
from ftgen.errors import LogError
from ftgen.results.baseline import read_baseline
from ftgen.results.compare import contradicts_itself, mean, read_tolerance, recomputed
from ftgen.results.fail_on import WORDS, read_words
from ftgen.results.keys import View
from ftgen.results.repeats import group
from ftgen.show import formats
from ftgen.show.formats import terminal
from ftgen.show.tables import tabulate

FP8_16 = "lora_nemo_llama3_8b_fp8_16"


def runs(*step_times_s, experiment=FP8_16, batch=64):
    return [summary_of(experiment, [time_s] * 20, batch, run_id=str(i)) for i, time_s in enumerate(step_times_s)]


def results(tmp_path, summaries, name="before.json"):
    path = tmp_path / name
    path.write_text(formats.render("json", View(summaries)))
    return str(path)


def test_exactly_three_published_cells_contradict_themselves():
    assert [(row.scheme, row.precision, row.gpus) for row in catalogue.published() if contradicts_itself(row)] == [
        ("sft", "bf16", 32),
        ("lora", "bf16", 16),
        ("lora", "fp8", 32),
    ]


@pytest.mark.parametrize(
    "row", catalogue.published(), ids=lambda row: f"{row.model}-{row.scheme}-{row.precision}-{row.gpus}"
)
def test_the_published_rows_follow_from_their_step_times_but_for_those(row):
    figures = recomputed(row)
    assert figures.step_time_s == row.step_time_s
    # printed to a tenth of a percent, cut or rounded; the 70B's FLOPs are rounded to 1.70e15
    assert figures.mfu == pytest.approx(row.mfu, **({"abs": 0.0007} if row.model == "llama3_8b" else {"rel": 0.008}))
    if not contradicts_itself(row):
        assert int(figures.tokens_per_s) == row.tokens_per_s
        assert figures.days_per_1t_tokens == pytest.approx(row.days_per_1t_tokens, abs=1)


def cells(view):
    (table,) = tabulate(view)
    return {top.text: [row[i].text for row in table.rows] for i, top in enumerate(table.header)}, table


def test_published_figures_stand_beside_what_their_step_time_gives():
    columns, table = cells(View(runs(0.69, experiment="lora_nemo_llama3_8b_fp8_32", batch=128), read_baseline("published")))
    assert columns["published, 32x H100"] == ["0.69", "771011 *", "35.9%", "15"]
    assert columns["published, 32x H100, from its step time"] == ["0.69", "759837", "35.93%", "15.2"]
    assert columns["ratio to published"] == ["1.000x"] * 4
    assert table.notes == ("* as published for 32 GPUs; its step time of 0.69 s gives 759837",)


def test_every_figure_has_its_ratio():
    columns, _ = cells(View(runs(1.36), read_baseline("published")))
    assert columns["ratio to published: regressed"] == ["2.000x", "0.500x", "0.500x", "2.000x"]


def test_a_regression_is_red_and_its_ratio_stays_beside_the_run_where_tables_are_folded():
    text = terminal.render(View(runs(0.7, 0.71, 0.72, 0.9), read_baseline("published")), width=80, colour=True)
    parts = text.split("Training step time")[1:]
    assert len(parts) > 2
    figures = [re.findall(r"\x1b\[([\d;]+)m *([\d.]+)x", part.splitlines()[0]) for part in parts]
    assert [colour for part in figures for colour, _ in part] == ["1;31"]  # the one that is 1.32 times as slow
    plain = [re.sub(r"\x1b\[[\d;]+m", "", part.splitlines()[0]).split() for part in parts]
    assert all(not line[0].endswith("x") for line in plain)


def test_a_file_of_results_is_a_baseline_of_the_mean_of_its_complete_runs(tmp_path):
    bad = [summary_of(FP8_16, [9.0] * 20 + [None], 64)]
    baseline = read_baseline(results(tmp_path, runs(0.6, 0.8) + bad))
    (run,) = runs(0.77)
    assert baseline.of(run).step_time_s == pytest.approx(0.7)
    assert baseline.ratio(run) == pytest.approx(1.1)
    assert "before.json" in cells(View([run], baseline))[0]


def test_runs_compared_with_themselves_are_as_fast(tmp_path):
    summaries = runs(0.7) + runs(0.9, experiment="sft_nemo_llama3_8b_fp8_16")
    baseline = read_baseline(results(tmp_path, summaries))
    assert [baseline.ratio(run) for run in summaries] == [1.0, 1.0]
    rows = json.loads(formats.render("json", View(summaries, baseline)))
    assert rows["baseline"] == {"name": "before.json", "tolerance": 0.05}
    assert [(row["step_time_ratio"], row["regressed"]) for row in rows["runs"]] == [(1.0, False)] * 2


def test_the_same_way_of_doing_the_work_is_preferred_and_a_mixture_is_none(tmp_path):
    plain, fast = runs(0.8)[0], runs(0.6)[0]._replace(options=("cuda_graphs",))
    other = fast._replace(options=("op_fuser",))
    both = read_baseline(results(tmp_path, [plain, fast]))
    assert [both.of(run) and both.of(run).step_time_s for run in (plain, fast, other)] == [0.8, 0.6, None]
    before = read_baseline(results(tmp_path, [plain]))
    assert before.ratio(fast) == pytest.approx(0.75)  # before and after an optimization


def test_other_work_is_not_compared(tmp_path):
    baseline = read_baseline(results(tmp_path, runs(0.7)))
    assert baseline.of(runs(0.7, experiment="lora_nemo_llama3_8b_fp8_8", batch=32)[0]) is None
    assert baseline.of(runs(0.7, batch=128)[0]) is None


@given(time_s=st.floats(0.01, 100), tolerance=st.floats(0, 1))
def test_only_what_is_slower_than_the_tolerance_is_a_regression(time_s, tolerance):
    (run,) = runs(time_s)
    baseline = read_baseline("published", tolerance)
    assert baseline.regressed(run) == (run.step_time_s / 0.68 > 1 + tolerance)


def test_the_mean_of_repeats_has_the_figures_of_its_step_time():
    figures, (run,) = mean(runs(0.6, 0.8)), runs(0.7)
    assert figures.tokens_per_s == pytest.approx(run.tokens_per_s)
    assert figures.mfu == pytest.approx(run.mfu)
    assert figures.days_per_1t_tokens == pytest.approx(run.days_per_1t_tokens)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not JSON: "),
        ("[" * 100_000, "is not JSON: "),
        ("[]", "must be a JSON object"),
        ('{"format": 2, "runs": []}', "format: must be 1, found 2"),
        ('{"format": 1}', "runs: is required"),
        ('{"format": 1, "runs": []}', "runs: no run is complete with a step time"),
        ('{"format": 1, "runs": [{"status": "complete"}]}', "runs.0.step_time_s: is required"),
    ],
)
def test_what_is_no_file_of_results_is_refused_and_located(text, error, tmp_path):
    path = tmp_path / "before.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LogError) as raised:
        read_baseline(str(path))
    assert str(raised.value).startswith(f"{path}: ")
    assert error in str(raised.value)


@pytest.mark.parametrize("figure", ["nan", "-1", "0", "1e999", '"0.7"', "true"])
def test_a_figure_that_is_none_is_refused(figure, tmp_path):
    path = results(tmp_path, runs(0.7))
    text = (tmp_path / "before.json").read_text().replace('"step_time_s": 0.7', f'"step_time_s": {figure}', 1)
    (tmp_path / "before.json").write_text(text.replace("nan", "NaN"))
    with pytest.raises(LogError, match=r"runs\.0\.step_time_s"):
        read_baseline(path)


def test_tolerances_are_percentages_or_fractions():
    assert (read_tolerance("5%"), read_tolerance("0.05"), read_tolerance("0")) == (0.05, 0.05, 0.0)
    for text in ("", "five", "-1%", "nan", "inf", "5 percent"):
        with pytest.raises(LogError, match="must be a percentage"):
            read_tolerance(text)


@pytest.mark.parametrize(
    ("words", "code"),
    [("incomplete", 1), ("failed", 1), ("invalid", 1), ("incomplete,invalid", 1), ("regression", 1), ("", 0)],
)
def test_fail_on_decides_the_exit_code(words, code, ftgen):
    done = ftgen("tabulate", "tests/logs/verdicts/logs", "--fail-on", words, "--baseline", "published", "--flat")
    assert done.returncode == code, done.stderr
    assert "lora_nemo_llama3_8b_bf16_8" in done.stdout  # the tables come whatever the verdict
    assert all(line.split(": ")[1] in words for line in done.stderr.splitlines())
    assert bool(done.stderr) == bool(code)


def test_good_runs_pass_every_word(ftgen):
    every = ",".join(WORDS)
    done = ftgen("tabulate", "tests/logs/documented/logs", "--fail-on", every, "--baseline", "published")
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_to_compare_is_no_success(ftgen):
    tiny = "tests/logs/plans/logs/experiments/sft_nemo_tiny_llama_fp32_1"
    done = ftgen("tabulate", tiny, "--fail-on", "regression", "--baseline", "published")
    assert done.returncode == 1
    assert "nothing could be compared" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fail-on", "regressions"], "did you mean regression?"),
        (["--fail-on", "regression"], "regression needs a baseline"),
        (["--tolerance", "much"], "must be a percentage"),
        (["--columns", "mfu,stepp"], "columns: unknown key stepp"),
        (["--sort", "-tokens"], "did you mean tokens_per_s?"),
        (["--window", "x"], "window: must be"),
        (["--format", "pdf"], "terminal, markdown, csv, json, html, latex"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_read(arguments, says, ftgen):
    done = ftgen("tabulate", "tests/logs/sizes/logs", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_unknown_words_are_refused():
    with pytest.raises(LogError, match="unknown word x"):
        read_words("x", compared=True)


def test_runs_of_unknown_work_are_not_compared(ftgen, tmp_path):
    """Unknown is never equal to unknown: only the global batch size of both is known, and the same."""
    case = "tests/logs/people/81_baseline_of_other_work"
    before = tmp_path / "before.json"
    ftgen("tabulate", f"{case}/logs/before", "--format", "json", "--output", before)
    assert json.loads(before.read_text())["runs"][0]["step_time_s"]
    done = ftgen("tabulate", f"{case}/logs/after", "--baseline", before, "--fail-on", "regression", "--flat")
    assert done.returncode == 1
    assert "nothing could be compared" in done.stderr


BRIDGE = FP8_16.replace("nemo", "megatron_bridge")


def test_a_run_compares_with_its_own_engine_and_with_the_other_only_where_asked(tmp_path):
    file = results(tmp_path, [*runs(1.0), *runs(0.5, experiment=BRIDGE)])
    (nemo,), (bridge,) = runs(1.1), runs(1.1, experiment=BRIDGE)
    assert (nemo.engine, bridge.engine, bridge.options) == ("nemo", "megatron_bridge", ("engine megatron_bridge",))
    own, other = read_baseline(file), read_baseline(file, across_engines=True)
    assert [own.ratio(run) for run in (nemo, bridge)] == pytest.approx([1.1, 2.2])
    assert [other.ratio(run) for run in (nemo, bridge)] == pytest.approx([2.2, 1.1])
    only_nemo = results(tmp_path, runs(1.0), "nemo.json")
    assert read_baseline(only_nemo).ratio(bridge) is None
    assert read_baseline(only_nemo, across_engines=True).ratio(bridge) == pytest.approx(1.1)


@pytest.mark.parametrize("baseline", [(), ("--baseline", "published"), ("--baseline", "history")])
def test_engines_are_compared_by_a_file_of_results(baseline, ftgen, tmp_path):
    done = ftgen("tabulate", tmp_path, *baseline, "--across-engines")
    assert done.returncode == 2
    assert "--across-engines requires --baseline with a file of results" in done.stderr


def test_runs_of_different_engines_are_no_repeats():
    groups = group([*runs(1.0), *runs(0.5, experiment=BRIDGE)])
    assert [(each.engine, each.runs) for each in groups] == [("nemo", 1), ("megatron_bridge", 1)]
