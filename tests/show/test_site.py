"""The site of a history: what its pages say, and how they look in a real Chromium."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import chromium, show_as
from runs import EVIL
from site_history import H100, REAL, planted
from test_report_layout import CLIPPED, OVERLAPPING, WIDTHS

from ftgen.show.site import experiments, site

FAST = "1795387558"
WIDEST = """
return Math.max(...[...document.querySelectorAll("table, svg, p, li")].map((each) => each.getBoundingClientRect().right));
"""


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """Every real run of a GPU in the repository, and thirty made-up ones of one work, which became slower."""
    return planted(tmp_path_factory.mktemp("history") / "all.sqlite")


@pytest.fixture(scope="module")
def folder(history, tmp_path_factory):
    """The site, with a sealed run."""
    from ftgen.cli.report import command as report
    from ftgen.cli.seal import command as seal

    where = tmp_path_factory.mktemp("site")
    (run,) = H100.glob(f"logs/experiments/*/*_{FAST}")
    seal.main([str(run), "-o", str(where / "run.ftgen.zip")], standalone_mode=False)
    words = ["--history", str(history.path), "--sealed", str(where / "run.ftgen.zip"), "-o", str(where / "pages")]
    report.main([*words, "--title", "Llama-3 8B on H100 and H200"], standalone_mode=False)
    return where / "pages"


class Links(HTMLParser):
    """Everything that a page links or loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.ids, self.tags, self.handlers = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.found += [value for name, value in attrs if name in {"href", "src"}]
        self.ids |= {value for name, value in attrs if name == "id"}


def links_of(page):
    links = Links()
    links.feed(page.read_text())
    return links


def test_every_link_leads_somewhere_and_none_leaves_the_site(folder):
    pages = {page.name: links_of(page) for page in folder.glob("*.html")}
    for links in pages.values():
        for link in links.found:
            if link == "data:,":
                continue
            name, _, anchor = link.partition("#")
            assert "//" not in name
            if name.endswith(".zip"):
                assert (folder / name).is_file()
            elif anchor:
                assert anchor in (pages[name] if name else links).ids
            else:
                assert name in pages


def test_the_index_has_our_records_beside_published_ones(folder):
    text = re.sub(r"<[^>]+>|\s+", " ", (folder / "index.html").read_text())
    assert "Records by hardware" in text
    assert "12,472" in text  # AutoModel's LoRA in BF16 on one H100
    assert re.search(r"slower by 5(\.\d)?% from run \d+ on", text)


def test_a_page_has_the_trend_the_runs_and_the_sealed_file(folder):
    page = next(page for page in folder.glob("*fp8*h100*.html"))
    text = page.read_text()
    assert "No change of the step time was found." not in text
    assert re.search("slower by", text)
    assert "sealed/lora_nemo_llama3_8b_fp8_1_run.ftgen.zip" in text
    assert text.count("<svg ") == 1
    assert "transformer-engine 2.9.0" in text


def test_only_the_planted_change_is_found(history):
    found = [(each.title, change) for each in experiments(history.records()) for of in each.found for change in of.changes]
    assert len(found) == 1
    ((title, change),) = found
    assert "LoRA FP8, 1x H100" in title
    assert change.ratio == pytest.approx(1.05, abs=0.01)
    assert change.versions == ("transformer-engine 2.9.0 -> 2.10.0",)


def test_the_same_history_gives_the_same_pages(history):
    first, second = (site(history.records(), {}, title="x") for _ in range(2))
    assert first == second


def test_names_are_nothing_but_text(history):
    (record,) = [of for of in history.records() if of["results"]["run_id"] == FAST]
    records = []
    for number, name in enumerate(EVIL):
        results = record["results"] | {"experiment": name, "run_id": name, "warnings": [name], "gpu": name, "model": name}
        records.append(
            {**record, "results": results | {"started": f"2026-01-{number + 1:02}T00:00:00"}, "environment": None}
        )
    pages = site(records, {}, title=EVIL[6])
    for text in pages.values():
        links = Links()
        links.feed(text)
        assert links.handlers == []
        assert (links.tags.count("script"), links.tags.count("img")) == (1, 0)
        assert not any(":" in link or "//" in link for link in links.found if link != "data:,")
    assert len(pages) == len(EVIL) + 1


def test_an_empty_history_gives_a_site(tmp_path):
    pages = site([], {}, title="x")
    assert list(pages) == ["index.html"]
    assert "No run is complete with a step time." in pages["index.html"]


def test_logs_or_a_history_are_needed(ftgen, tmp_path, history):
    assert "give LOGS, or a history" in ftgen("report").stderr
    done = ftgen("report", H100, "--history", history.path)
    assert (done.returncode, "not both" in done.stderr) == (2, True)
    done = ftgen("report", "--history", tmp_path / "none.sqlite", "-o", tmp_path / "site")
    assert (done.returncode, "there is no such history" in done.stderr) == (1, True)


def test_a_sealed_run_that_was_changed_is_refused(ftgen, tmp_path, history):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    done = ftgen("report", "--history", history.path, "--sealed", tmp_path / "a.zip", "-o", tmp_path / "site")
    assert (done.returncode, "is no zip that can be read" in done.stderr) == (1, True)


def test_a_sealed_run_of_no_run_is_left_out_and_named(ftgen, tmp_path):
    runs = {name: next(path for path in REAL[0].glob(f"logs/experiments/*/*_{name}")) for name in (FAST, "1795387355")}
    ftgen("history", "add", runs[FAST], "--history", tmp_path / "a.sqlite")
    ftgen("seal", runs["1795387355"], "-o", tmp_path / "a.zip")
    done = ftgen("report", "--history", tmp_path / "a.sqlite", "--sealed", tmp_path, "-o", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert "left out: the history has no run with this log" in done.stderr
    assert "1 experiments, 0 sealed runs" in done.stdout


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_every_label_is_whole_and_no_page_scrolls_sideways(browser, folder, width):
    show_as(browser, width=width, height=WIDTHS[width])
    for page in sorted(folder.glob("*.html")):
        browser.get(page.as_uri())
        assert browser.execute_script(CLIPPED) == [], page.name
        assert browser.execute_script(OVERLAPPING) == [], page.name
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page.name


@pytest.mark.browser
def test_a_page_loads_nothing_and_its_script_runs(browser, folder):
    show_as(browser, width=1280)
    browser.get_log("performance"), browser.get_log("browser")
    page = next(page for page in folder.glob("*fp8*h100*.html"))
    browser.get(page.as_uri())
    browser.find_element("css selector", "figure").send_keys("\ue012\ue014")  # the left and the right arrow
    assert "run" in browser.find_element("css selector", "output").text
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith(("file:", "data:"))} == set()
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_nothing_is_cut_off_in_print(browser, folder):
    """On A4: what is wider than the paper would be lost."""
    show_as(browser, width=718, height=1000)  # 190 mm at 96 pixels an inch
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    for page in sorted(folder.glob("*.html")):
        browser.get(page.as_uri())
        assert browser.execute_script(WIDEST) <= 718, page.name
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_pages_are_small(folder):
    assert sum(page.stat().st_size for page in Path(folder).glob("*.html")) < 1_500_000
