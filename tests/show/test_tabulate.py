"""From directories of logs to tables: every case of tests/logs/, and the formulas of the recipe."""

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import EVIL, summary_of

from ftgen import catalogue
from ftgen.errors import LogError
from ftgen.logs.find import find_runs
from ftgen.results.keys import RUN, View
from ftgen.results.summary import summarize
from ftgen.show import formats, tables
from ftgen.show.formats import terminal
from ftgen.show.formats.csv import FORMULA
from ftgen.units import clean

CASES = sorted(path for path in (Path(__file__).parents[1] / "logs").iterdir() if (path / "logs").is_dir())
CONTROL = re.compile(r"[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logs_give_the_expected_runs_and_tables(case, matches_golden, monkeypatch):
    monkeypatch.chdir(case)
    view = View([summarize(run) for run in find_runs(["logs"])])
    matches_golden(case / "expected.json", formats.render("json", view))
    matches_golden(case / "expected.md", formats.render("markdown", view))
    matches_golden(case / "expected.txt", terminal.render(view, width=100, colour=False))


@pytest.mark.parametrize(
    ("scheme", "precision", "time_s", "tokens", "mfu"),
    [
        ("sft", "bf16", 1.32, "99296", "56.38%"),
        ("sft", "fp8", 0.95, "137970", "39.15%"),  # documented as 39.16%
        ("lora", "bf16", 0.92, "142469", "53.93%"),  # as 53.9%
        ("lora", "fp8", 0.68, "192752", "36.46%"),  # as 36.4%
    ],
)
def test_documented_step_times_give_the_documented_figures(scheme, precision, time_s, tokens, mfu):
    experiment = f"{scheme}_nemo_llama3_8b_{precision}_8"
    summary = summary_of(experiment, [time_s] * 100, batch=32)
    assert (tables.whole(summary.tokens_per_s), tables.percent(summary.mfu, 2)) == (tokens, mfu)
    assert summary.published_step_time_s == time_s
    assert int(tokens) == summary.published.tokens_per_s


def test_the_step_time_is_the_mean_of_exactly_the_window():
    times = [9.0] * 80 + [1.0] * 10 + [2.0] * 10
    assert summary_of("x", times).step_time_s == 1.5
    assert summary_of("x", times, window=10).step_time_s == 2.0
    assert summary_of("x", times, window=100).step_time_s == 7.5
    assert summary_of("x", times, window=101).step_time_s is None


def test_too_few_steps_give_no_step_time_and_say_so():
    summary = summary_of("sft_nemo_llama3_8b_bf16_8", [1.0] * 18)
    assert summary.reason == "the window needs 20 steps, but the log has 18: no step time is reported (try --window 9)"
    assert (summary.step_time_s, summary.tokens_per_s, summary.mfu, summary.days_per_1t_tokens) == (None,) * 4


def test_a_window_of_no_steps_is_refused():
    with pytest.raises(LogError, match="at least 1 step, found 0"):
        summary_of("x", [1.0], window=0)


def test_only_the_same_work_is_compared_with_what_is_published():
    assert summary_of("lora_nemo_llama3_8b_fp8_16", [1.0] * 20, batch=64).published_step_time_s == 0.68
    assert summary_of("lora_nemo_llama3_8b_fp8_16", [1.0] * 20, batch=32).published_step_time_s is None
    assert summary_of("lora_nemo_llama3_8b_fp8_64", [1.0] * 20, batch=256).published_step_time_s is None


@pytest.mark.parametrize("row", catalogue.published(), ids=lambda row: f"{row.scheme}-{row.precision}-{row.gpus}")
def test_published_figures_print_as_they_were_published(row):
    cells = [column.how(row) for column in tables.COLUMNS]
    as_printed = [row.step_time_s, row.tokens_per_s, round(row.mfu * 100, 2), row.days_per_1t_tokens]
    assert [float(cell.rstrip("%")) for cell in cells] == as_printed


def test_what_is_not_known_is_a_dash_and_never_zero():
    summary = summary_of("some_run", [1.0] * 20, batch=None)
    assert "–" in formats.render("markdown", View([summary]))
    assert json.loads(formats.render("json", View([summary])))["runs"][0]["tokens_per_s"] is None
    row = next(csv.DictReader(io.StringIO(formats.render("csv", View([summary])))))
    assert row["tokens_per_s"] == row["mfu"] == ""


def test_json_has_exactly_the_documented_keys():
    record = json.loads(formats.render("json", View([summary_of("x", [1.0] * 20)])))
    assert list(record) == ["format", "baseline", "runs", "groups"]
    assert list(record["runs"][0]) == [field.key for field in RUN]


def test_colour_is_for_terminals_only():
    summary = summary_of("sft_nemo_llama3_8b_bf16_8", [1.0] * 18)
    assert "\x1b" not in terminal.render(View([summary]), width=80)
    assert "\x1b" in terminal.render(View([summary]), width=80, colour=True)


@pytest.mark.parametrize("width", [40, 80, 132])
def test_tables_fit_the_terminal_and_keep_their_numbers_whole(width):
    summaries = [summary_of(f"lora_nemo_llama3_8b_fp8_{gpus}", [0.68] * 20, batch=4 * gpus) for gpus in (8, 16, 32)]
    summaries = [summary._replace(notes=()) for summary in summaries]  # prose is wrapped by the terminal itself
    text = terminal.render(View(summaries), width=width, colour=False)
    assert max(map(len, text.splitlines())) <= width
    for summary in summaries:
        assert tables.whole(summary.tokens_per_s) in text


@given(name=st.one_of(st.sampled_from(EVIL), st.text(max_size=30)))
def test_names_are_text_in_every_format(name):
    texts_of: dict = {"warnings": (name,), "notes": (name, name)}
    texts_of |= dict.fromkeys(("experiment", "run_id", "reason", "log", "model", "scheme", "precision", "gpu"), name)
    summary = summary_of("x", [1.0] * 20)._replace(**texts_of)
    texts = {format_: formats.render(format_, View([summary])) for format_ in formats.FORMATS}
    assert not any(CONTROL.search(text) for text in texts.values())
    assert json.loads(texts["json"])["runs"][0]["experiment"] == clean(name)
    rows = list(csv.reader(io.StringIO(texts["csv"])))
    assert len(rows) == 2
    assert not any(cell.lstrip().startswith(FORMULA) for cell in rows[1])
    assert all(line.count("|") - line.count("\\|") in {0, 3, 5} for line in texts["markdown"].splitlines())
    assert "<script" not in texts["markdown"].replace("\\<", "")


@given(times=st.lists(st.floats(1e-5, 1e5) | st.none(), min_size=1, max_size=30), window=st.integers(1, 30))
def test_figures_are_finite_or_not_there(times, window):
    summary = summary_of("lora_nemo_llama3_8b_bf16_8", times, window=window)
    figures = [summary.step_time_s, summary.tokens_per_s, summary.days_per_1t_tokens]
    if not any(warning.startswith("the MFU would be") for warning in summary.warnings):
        figures.append(summary.mfu)
    there = len(times) >= window and None not in times[-window:]
    assert all((figure is not None) == there for figure in figures)
    assert all(math.isfinite(figure) for figure in figures if figure is not None)
    assert there or "no step time is reported" in summary.reason
