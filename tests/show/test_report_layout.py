"""The report in a real Chromium: at each width every label is whole, and the first screen holds the answer."""

import pytest
from browser import chromium, show_as
from test_report import ROOT, page_of

from ftgen.logs.find import runs_below
from ftgen.show.report import read

GPUS = [ROOT / "tests" / "logs" / case for case in ("h100", "h200", "h200_pair", "h200_parallel")]
TITLE = "Llama-3 8B on one H100, one and two H200s, November 2026"
WIDTHS = {360: 800, 800: 1000, 1280: 900}  # pixels of the screen: its height by its width

CLIPPED = """
const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
const found = [];
for (const svg of document.querySelectorAll("svg"))
  for (const text of svg.querySelectorAll("text"))
    if (text.textContent && !inside(text.getBoundingClientRect(), svg.getBoundingClientRect())) found.push(text.textContent);
return found;
"""
OVERLAPPING = """
const found = [];
const cross = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;  // a line's box is higher than its letters
for (const svg of document.querySelectorAll("svg")) {
  const shown = (text) => text.textContent.trim() && text.getAttribute("opacity") !== "0";
  const texts = [...svg.querySelectorAll("text")].filter(shown);
  const boxes = texts.map((text) => text.getBoundingClientRect());
  boxes.forEach((a, i) => boxes.slice(0, i).forEach((b, j) => {
    if (cross(a, b)) found.push(`${texts[i].textContent} | ${texts[j].textContent}`);
  }));
}
return found;
"""
FIRST_SCREEN = """
const rows = [...document.querySelectorAll(".fastest tbody tr:not(.model)")];
return rows.filter((row) => row.getBoundingClientRect().bottom <= window.innerHeight).length / rows.length;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, logs in (("gpus", GPUS), ("verdicts", [ROOT / "tests" / "logs" / "verdicts"])):
        found[name] = folder / f"{name}.html"
        found[name].write_text(page_of(read(runs_below(logs)), TITLE))
    return found


@pytest.fixture(params=WIDTHS)
def width(request):
    return request.param


@pytest.fixture(params=["gpus", "verdicts"])
def opened(request, browser, pages, width):
    show_as(browser, width=width, height=WIDTHS[width])
    browser.get(pages[request.param].as_uri())
    return browser


@pytest.mark.browser
def test_every_label_is_whole_and_the_page_does_not_scroll_sideways(opened, width):
    assert opened.execute_script(CLIPPED) == []
    assert opened.execute_script(OVERLAPPING) == []
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_the_first_screen_holds_the_answer(opened, width):
    assert opened.execute_script(FIRST_SCREEN) >= (0.5 if width == 360 else 1)
    link = opened.execute_script(
        "return document.querySelector('.fastest .missing a, .fastest .run a').getAttribute('href')"
    )
    assert opened.execute_script("return document.querySelector(arguments[0]).tagName", link) == "ARTICLE"
