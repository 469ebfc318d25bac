"""Formats: what each promises, and that nothing in a name or a log gets out of its place."""

import csv
import io
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from debian import program
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from runs import EVIL, summary_of

from ftgen.logs.find import find_runs
from ftgen.results.baseline import read_baseline
from ftgen.results.compare import Baseline
from ftgen.results.fail_on import WORDS, failures
from ftgen.results.keys import GROUP, RUN, View, json_schema, read_keys, rows
from ftgen.results.options import options
from ftgen.results.summary import summarize
from ftgen.show import formats
from ftgen.show.formats import terminal
from ftgen.show.formats.latex import escaped

ROOT = Path(__file__).parents[2]
CASES = sorted(path for path in (Path(__file__).parents[1] / "logs").iterdir() if (path / "logs").is_dir())
SIZES = {"lora_nemo_llama3_8b_fp8_8": 32, "lora_nemo_llama3_8b_fp8_16": 64, "lora_nemo_llama3_8b_fp8_32": 128}


def sizes():
    return [summary_of(name, [0.7 + gpus / 1000] * 20, gpus) for name, gpus in SIZES.items()]


@pytest.mark.parametrize("format_", ["html", "latex", "csv"])
def test_formats_are_as_expected(format_, matches_golden, monkeypatch):
    case = ROOT / "tests" / "logs" / "sizes"
    monkeypatch.chdir(case)
    view = View([summarize(run) for run in find_runs(["logs"])], read_baseline("published", 0.01))
    text = re.sub("(?s)<style>.*?</style>", "<style></style>", formats.render(format_, view))
    matches_golden(case / f"expected.{format_}", text)


def test_the_published_schema_is_that_of_the_results(ftgen, request):
    path = ROOT / "docs" / "results.schema.json"
    text = ftgen("schema", "--results").stdout
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert path.read_text() == text
    Draft202012Validator.check_schema(json.loads(text))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_json_is_as_its_schema_says(case):
    view = View([summarize(run) for run in find_runs([case / "logs"])], read_baseline("published"))
    Draft202012Validator(json_schema()).validate(json.loads(formats.render("json", view)))


def test_columns_and_order_are_those_asked_for():
    view = View(sizes(), columns=read_keys("gpus, mfu"), sort=read_keys("-gpus"))
    assert [line.split(",")[0] for line in formats.render("csv", view).splitlines()] == ["gpus", "32", "16", "8"]
    assert formats.render("markdown", view).startswith("| GPUs | MFU |\n")
    assert [run["gpus"] for run in json.loads(formats.render("json", view))["runs"]] == [32, 16, 8]


def test_a_second_key_orders_what_the_first_leaves_equal():
    summaries = [run._replace(gpu=gpu) for run, gpu in zip(sizes(), ("a100", "h100", "a100"), strict=True)]
    found = rows(View(summaries, sort=("gpu", "-gpus")))
    assert [(row["gpu"], row["gpus"]) for row in found] == [("a100", 32), ("a100", 8), ("h100", 16)]


@pytest.mark.parametrize("sort", ["step_time_s", "-step_time_s"])
def test_what_is_not_known_comes_last_whatever_the_order(sort):
    runs = [summary_of("x", [1.0] * 3), summary_of("x", [2.0] * 20), summary_of("x", [1.0] * 20)]
    times = [row["step_time_s"] for row in rows(View(runs, sort=(sort,)))]
    assert times == ([1.0, 2.0, None] if sort == "step_time_s" else [2.0, 1.0, None])


def test_repeats_are_one_with_mean_spread_and_number():
    repeats = [summary_of("lora_nemo_llama3_8b_fp8_8", [t] * 20, run_id=str(t)) for t in (0.6, 0.7, 0.8)]
    failed = repeats[0]._replace(status="failed", step_time_s=9.0)
    (row,) = rows(View([*repeats, failed], group=True))
    assert (row["runs"], row["counted"]) == (4, 3)
    assert row["step_time_s"] == pytest.approx(0.7)
    assert row["step_time_spread_s"] == pytest.approx(0.1)
    text = formats.render("markdown", View([*repeats, failed], group=True))
    assert "8x H100 GPUs (GBS=32), mean of 3 of 4 runs" in text
    assert "0.7 ± 0.1" in text
    assert list(row) == [field.key for field in GROUP]


def test_runs_that_did_the_work_in_another_way_are_no_repeats():
    name = "lora_nemo_llama3_8b_fp8_8"
    ways = [(), (), ("TP 2", "cuda_graphs", "op_fuser")]
    runs = [summary_of(name, [0.6 + i / 10] * 20, run_id=str(i))._replace(options=way) for i, way in enumerate(ways)]
    assert [(row["runs"], row["options"]) for row in rows(View(runs, group=True))] == [(2, []), (1, [*ways[2]])]
    text = formats.render("markdown", View(runs, group=True))
    assert "8x H100 GPUs (GBS=32), mean of 2" in text
    assert "8x H100 GPUs (GBS=32), TP 2, 2 optimizations" in text


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (None, ()),
        ({"micro_batch_size": 2, "parallelism": {"tensor_model_parallel_size": 1}}, ("MBS 2",)),
        ({"optimizations": {"b": True, "a": True, "c": False, "d": 1}}, ("a", "b")),
        ({"optimizations": [1], "parallelism": "x", "micro_batch_size": "2"}, ()),
    ],
)
def test_a_plan_says_in_which_way_it_differs(plan, words):
    assert options(plan) == words


def test_csv_has_a_row_a_run_and_every_key():
    table = list(csv.DictReader(io.StringIO(formats.render("csv", View(sizes())))))
    assert [row["gpus"] for row in table] == ["8", "16", "32"]
    assert list(table[0]) == [field.key for field in RUN]


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]

    def handle_data(self, data):
        self.text.append(data)


def named(name):
    of = dict.fromkeys(("experiment", "run_id", "reason", "log", "model", "scheme", "precision", "gpu"), name)
    run = summary_of("x", [1.0] * 20)._replace(warnings=(name,), notes=(name,), **of)
    return View([run], Baseline(name, read_baseline("published").figures))


HARMLESS = Page(formats.render("html", named("x")))


@given(name=st.one_of(st.sampled_from(EVIL), st.text(min_size=1, max_size=30)))
@settings(max_examples=200)
def test_no_name_becomes_markup_in_html(name):
    page = Page(formats.render("html", named(name)))
    assert page.tags == HARMLESS.tags
    assert [at[:2] for at in page.attributes] == [at[:2] for at in HARMLESS.attributes]
    assert not {"script", "img", "iframe", "link", "a"} & set(page.tags)


# What may stand in LaTeX's text: plain letters, and the commands that `escaped` writes.
PLAIN = re.compile(
    r"-\{\}|\{[\[*]\}|[^\\&%$#_{}~^<>|\[*\"'`\x00-\x1f\x7f-\U0010ffff]"
    r"|\\text(?:backslash|asciitilde|asciicircum|less|greater|bar|quotesingle|asciigrave|endash)\{\}|\\char34\{\}"
    r"|\$\\pm\$|\\[&%$#_{}]"
)


@given(text=st.one_of(st.sampled_from(EVIL), st.text(max_size=40)))
def test_no_name_becomes_a_command_in_latex(text):
    written = escaped(text)
    assert not PLAIN.sub("", written), written
    assert not re.search("--|[?!]`", written)


@pytest.mark.tex
def test_pdflatex_sets_the_tables_with_the_names_as_they_are(tmp_path):
    pdflatex, pdftotext = program("pdflatex", "texlive-latex-base"), program("pdftotext", "poppler-utils")
    runs = [run for name in EVIL for run in named(name).runs]
    tables = formats.render("latex", View(runs[:8], columns=("run_id", "gpus"))) + formats.render("latex", View(sizes()))
    names = "\n\n".join(escaped(name) for name in EVIL)
    body = "\\documentclass{article}\\usepackage[margin=5mm,paperwidth=90cm]{geometry}\\begin{document}\\tiny\n"
    (tmp_path / "t.tex").write_text(f"{body}{names}\n\n{tables}\n\\end{{document}}\n", encoding="utf-8")
    done = subprocess.run([pdflatex, "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    subprocess.run([pdftotext, "-layout", "t.pdf"], cwd=tmp_path, check=True)
    text = (tmp_path / "t.txt").read_text()
    assert "<script>alert(1)</script>" in text
    assert r"\input{/etc/passwd}" in text
    assert "8x H100 GPUs (GBS=32)" in text
    assert "{{ 7 * 7 }}{% raw %}" in text


@given(name=st.one_of(st.sampled_from(EVIL), st.text(min_size=1, max_size=30)))
def test_no_name_becomes_a_formula_in_csv(name):
    for row in csv.reader(io.StringIO(formats.render("csv", named(name)))):
        assert not any(cell.lstrip().startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t")) for cell in row)


@given(name=st.one_of(st.sampled_from(EVIL), st.text(min_size=1, max_size=30)))
def test_no_name_moves_the_cursor_of_a_terminal(name):
    for flat in (False, True):
        text = terminal.render(named(name)._replace(flat=flat), width=200, colour=True)
        assert not re.search(r"[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e]", re.sub(r"\x1b\[[\d;]*m", "", text))
        assert "\x1b" not in re.sub(r"\x1b\[[\d;]*m", "", text)
    view = View([run._replace(status="failed", step_time_s=9.0) for run in named(name).runs], read_baseline("published", 0))
    assert all(line.isprintable() for line in failures(view, WORDS))
