"""The report: one file, complete, harmless whatever the logs say, and as it is in a real browser."""

import base64
import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from browser import chromium, show_as
from debian import program
from logs import make
from markupsafe import Markup
from runs import EVIL, log_of, summary_of
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from test_export import Page

from ftgen.logs import many
from ftgen.logs.failures import Told
from ftgen.logs.find import find_runs, runs_below
from ftgen.logs.read import read_log
from ftgen.logs.step import Step
from ftgen.logs.steps import Steps
from ftgen.results.baseline import read_baseline
from ftgen.results.keys import View
from ftgen.results.summary import summarize
from ftgen.show import charts, group_charts
from ftgen.show import report as report_module
from ftgen.show.curves import MOST_POINTS, curves
from ftgen.show.report import Reading, flattened, read, report
from ftgen.units import clean

ROOT = Path(__file__).parents[2]
LOGS = [ROOT / "tests" / "logs" / case / "logs" for case in ("sizes", "verdicts", "documented")]


def page_of(runs, title="Results"):
    return "".join(report(runs, View((), read_baseline("published")), title=title))


@pytest.fixture(scope="module")
def text():
    return page_of(read(runs_below(LOGS)))


def made_up(name, times):
    experiment = "lora_nemo_llama3_8b_fp8_16"
    return summary_of(experiment, times, 64, run_id=name), log_of(experiment, times, 64)


def test_every_run_is_told_of_with_what_its_verdict_stands_on(text):
    words = " ".join(Page(text).text)
    for run in find_runs(LOGS):
        assert str(run.log) in words
        assert (summarize(run).reason or "") in words
        assert all(ending.note in words for ending in read_log(run).at_end.values() if not ending.json)


def test_several_processes_read_what_one_does(monkeypatch):
    monkeypatch.setattr(many, "ALONE", 2000)
    read_by = [read(runs_below(LOGS), processes=processes) for processes in (1, 2)]
    assert [(one.run, one.told) for one in read_by[0]] == [(one.run, one.told) for one in read_by[1]]


def test_a_run_is_drawn_when_its_part_of_the_page_is_written(monkeypatch):
    drawn = []
    monkeypatch.setattr(report_module, "svg", lambda chart: drawn.append(chart) or Markup("<svg/>"))
    runs = [Reading.of(*made_up(f"{number}", [0.7] * 25)) for number in range(30)]
    before = []
    for piece in report(runs, View(()), title="x"):
        before += [len(drawn)] * len(re.findall('<article id="', piece))
    overview = before[0] - 2
    assert before == [overview + 2 * number for number in range(1, 31)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak memory")
def test_what_is_kept_of_a_run_does_not_grow_with_its_log(tmp_path):
    code = (
        "import re, sys; from ftgen.logs.find import runs_below; from ftgen.show.report import read;"
        "(one,) = read(runs_below(sys.argv[1:]), processes=1);"
        "print(len(one.packed), len(one.told.curves.times.points));"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    found = []
    for steps in (1000, 200_000):
        path = tmp_path / f"log-a.sft_nemo_llama3_8b_bf16_8_{steps}_0.out"
        path.write_text("".join(make.step_lines(steps, 32, 1.32)))
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        found.append([*map(int, done.stdout.split())])
    assert max(packed for packed, _, _ in found) < 40_000
    assert max(points for _, points, _ in found) <= MOST_POINTS
    assert found[1][2] - found[0][2] < 24 << 10, f"{found} KiB"  # 50 MB are read


def test_the_page_needs_nothing_but_itself(text):
    page = Page(text)
    references = [
        value for _, key, value in page.attributes if key in {"src", "href", "xlink:href", "action", "data", "srcset"}
    ]
    assert all(value.startswith("#") or value == "data:," for value in references)
    assert not re.search(r"@import|url\(", text)
    assert page.tags.count("script") == 1


def test_only_the_page_s_own_script_may_run(text):
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def hostile(name):
    summary, log = made_up("1", [0.7] * 25)
    of = dict.fromkeys(("experiment", "run_id", "reason", "log", "model", "scheme", "precision"), name)
    log.plan = {name: {name: name}} if name else {}
    log.environment = {name: name}
    log.told = {"error": Told("error", name)}
    summary = summary._replace(gpu=name, warnings=(name,), notes=(name,), **of)
    return [Reading.of(summary, log), Reading.of(summary._replace(run_id=f"{name}2"), log)]


@pytest.mark.parametrize("name", EVIL)
def test_no_name_becomes_markup(name):
    plain = re.sub(r"\S", "x", clean(name))  # as long, with spaces at the same places: its labels have as many lines
    page, harmless = Page(page_of(hostile(name), name)), Page(page_of(hostile(plain), plain))
    assert page.tags == harmless.tags
    assert [at[:2] for at in page.attributes] == [at[:2] for at in harmless.attributes]


def test_the_window_is_where_the_summary_says():
    summary, log = made_up("1", [2.0] * 5 + [1.0] * 20)
    shade = charts.step_times(summary, curves(log.steps).times).spec["layer"][0]["data"]["values"][0]
    assert (shade["first"], shade["last"], shade["mean"]) == (4.5, 24.5, 1.0)


def test_a_step_off_the_scale_is_drawn_at_its_edge_and_says_its_time():
    summary, log = made_up("1", [60.0] + [1.0] * 30)
    spec = charts.step_times(summary, curves(log.steps).times).spec
    (first, *_) = next(layer for layer in spec["layer"] if layer["mark"].get("shape"))["data"]["values"]
    assert (first["value"], first["label"]) == (3.0, "step 0: 60 s")


def test_long_curves_keep_their_extremes():
    steps = {step: Step(1.0 + (step == 5000) - 0.5 * (step == 7777) + 9 * (step < 3), None) for step in range(10_000)}
    thin = curves(Steps(steps)).times
    assert len(thin.points) <= MOST_POINTS
    assert {(5000, 2.0), (7777, 0.5)} <= set(thin.points)
    assert thin.points == sorted(thin.points)
    assert (thin.known, thin.first, thin.last, thin.middle, thin.beyond) == (10_000, 10.0, 1.0, 1.0, 3)


def test_scaling_is_by_the_fewest_gpus_with_as_much_work_for_each():
    from ftgen.results.repeats import group

    times = {8: 0.70, 16: 0.70, 32: 0.875}
    runs = [summary_of(f"lora_nemo_llama3_8b_fp8_{gpus}", [time] * 20, 4 * gpus) for gpus, time in times.items()]
    values = group_charts.scaling(group(runs), {}).spec["data"]["values"]
    measured = {value["gpus"]: round(value["value"], 3) for value in values if value["source"] == group_charts.MEASURED}
    assert measured == {8: 1.0, 16: 1.0, 32: 0.8}


def test_plans_are_flattened_to_dotted_keys():
    assert flattened({"a": {"b": [1, None], "c": {}}, "d": "x"}) == [("a.b", "[1, null]"), ("a.c", "{}"), ("d", "x")]


def test_the_command_writes_one_file(ftgen, tmp_path):
    done = ftgen("report", *LOGS, "-o", tmp_path / "r.html", "--title", "Results & more")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'r.html'}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert "<h1>Results &amp; more</h1>" in (tmp_path / "r.html").read_text()


def test_the_library_that_draws_is_imported_for_the_report_alone():
    command = [sys.executable, "-X", "importtime", "-m", "ftgen", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "ftgen.cli" in done.stderr
    assert "vl_convert" not in done.stderr


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, text, tmp_path):
    def look(text=text, *, width=1280, dark=False):
        path = tmp_path / "report.html"
        path.write_text(text)
        show_as(browser, width=width, dark=dark)
        browser.get(path.as_uri())
        return browser

    return look


@pytest.mark.browser
def test_it_opens_offline_without_a_complaint(opened):
    browser = opened()
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    wanted = {
        request["request"]["url"].partition(":")[0] for request in sent if request["documentURL"] == browser.current_url
    }
    assert wanted <= {"file", "data"}
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(sizes) > 10
    assert min(sizes) > 60


@pytest.mark.browser
def test_a_chart_is_read_with_the_keyboard_alone(opened):
    browser = opened()
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the results"
    seen = set()
    for _ in range(60):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        active = browser.switch_to.active_element
        seen.add(active.tag_name)
        if active.tag_name == "figure":
            break
    assert {"a", "div", "figure"} <= seen  # contents, tables that scroll, charts
    outline = active.value_of_css_property("outline-style")
    assert outline == "solid"
    said = active.find_element(By.TAG_NAME, "output")
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    first = said.text
    ActionChains(browser).send_keys(Keys.END).perform()
    assert re.fullmatch(r".+: (measured|published, .+|ideal, at the dense peak): [\d,]+ tokens per second and GPU", first)
    assert said.text not in {"", first}
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not said.text.strip()


@pytest.mark.browser
def test_the_pointer_reads_a_curve_step_by_step(opened):
    browser = opened()
    figure = browser.find_element(By.CSS_SELECTOR, "article figure")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
    points = figure.find_elements(By.CSS_SELECTOR, '[role="graphics-symbol"][aria-label^="step"]')
    ActionChains(browser).move_to_element(points[12]).perform()
    assert figure.find_element(By.TAG_NAME, "output").text == points[12].get_attribute("aria-label")


CONTRAST = """
const probe = document.body.appendChild(document.createElement("i"));
const light = (name) => {
  probe.style.color = `var(${name})`;
  const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((c) => {
    const part = c / 255;
    return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
return arguments[0].map((name) => Math.min(ratio(name, "--paper"), ratio(name, "--panel")));
"""


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_letters_and_curves_stand_out(dark, opened):
    browser = opened(dark=dark)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    letters = browser.execute_script(CONTRAST, ["--ink", "--soft", "--good", "--bad", "--warn", "--series-1"])
    assert min(letters) >= 4.5  # WCAG 2, text
    curves = browser.execute_script(CONTRAST, [f"--series-{number}" for number in range(1, 9)])
    assert min(curves) >= 3  # WCAG 2, graphics


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 768])
def test_only_wide_tables_scroll_sideways(width, opened):
    browser = opened(width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_it_prints_in_ink_whatever_the_screen(opened, tmp_path):
    browser = opened(dark=True)
    data = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    (tmp_path / "r.pdf").write_bytes(base64.b64decode(data))
    subprocess.run([program("pdftotext", "poppler-utils"), "-layout", "r.pdf"], cwd=tmp_path, check=True)
    words = (tmp_path / "r.txt").read_text()
    assert "Fastest runs" in words
    assert "out of GPU memory" in words
    subprocess.run(
        [program("pdftoppm", "poppler-utils"), "-r", "10", "-gray", "-f", "1", "-l", "1", "r.pdf", "r"],
        cwd=tmp_path,
        check=True,
    )
    (image,) = tmp_path.glob("r-*.pgm")
    pixels = image.read_bytes()[-1000:]
    assert max(pixels) == 255  # white paper


@pytest.mark.browser
@pytest.mark.parametrize("name", [name for name in EVIL if "alert" in name or "{{" in name or "\\" in name])
def test_nothing_runs_that_a_log_brings(name, opened):
    browser = opened(page_of(hostile(name), name))
    assert browser.execute_script("return window.alert.toString()") == "function alert() { [native code] }"
    assert not [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    figures = browser.find_elements(By.CSS_SELECTOR, "article figure")
    ActionChains(browser).move_to_element(figures[0]).perform()  # an alert would make this fail
