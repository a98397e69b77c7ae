"""The page in a real browser."""

import pytest
from report_browser import CHROMIUM, chromium
from report_results import write

from benchmark_suite.report.page import page
from benchmark_suite.report.summary import summarize

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium; apt-get install chromium")

#: Columns are found by their heading, as a reader does.
HELPERS = """
const table = document.querySelector('table[data-table="best"]');
const header = (label) => [...table.tHead.rows[0].cells].find((cell) => cell.innerText.includes(label));
const column = (label) => [...table.tBodies[0].rows].filter((row) => row.offsetParent)
  .map((row) => row.cells[header(label).cellIndex].innerText);
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    for at, task in enumerate(("dialogsum-v1", "gsm8k-v1", "hellaswag-v1", "iwslt2017-v1", "squad-v1")):
        for place, variant in enumerate(("LoRA", "TL5", "TL6", "VeRA")):
            for rank in (2, 8):
                scores = [int((example * 7 + place + at) % 10 < 5 + place) for example in range(20)]
                fields = {"task": task, "variant": variant, "rank": rank, "trainable": 9 * 10**place * rank}
                write(results / f"{task}-{variant}-{rank}", scores, **fields)
    write(results / "failed", status="failed", error="CUDA out of memory: " + 40 * "0123456789")
    file = results / "report.html"
    file.write_text(page(summarize(results, "LoRA")), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_headers_sort_by_number_and_by_name(browser, report):
    browser.open(report, 1280)

    def clicked(label):
        return browser.run(f"{{ {HELPERS} header('{label}').querySelector('button').click(); column('{label}') }}")

    sizes = [int(text.replace(",", "")) for text in clicked("Trainable")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 3
    assert [int(text.replace(",", "")) for text in clicked("Trainable")] == sizes[::-1]
    names = clicked("Variant")
    assert names == sorted(names) and names[0] == "LoRA"
    state = "[...document.querySelectorAll('[aria-sort]')].map((cell) => cell.getAttribute('aria-sort'))"
    assert browser.run(state) == ["ascending"]
    differences = clicked("Δ LoRA")
    assert differences[-5:] == 5 * [""] and "" not in differences[:-5]


def test_the_filter_keeps_rows_with_every_word(browser, report):
    browser.open(report, 1280)

    def typed(text):
        script = f"input.value = '{text}'; input.dispatchEvent(new Event('input')); column('Variant')"
        return browser.run(f"{{ {HELPERS} {script} }}")

    assert typed("tl6 gsm8k") == ["TL6"]
    assert browser.run("document.querySelector('[data-table=best]').closest('section').innerText").endswith(
        "1 of 20 rows"
    )
    assert len(typed("")) == 20


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_screen(browser, report, width, dark):
    browser.open(report, width, dark)
    # Fifteen columns do not fit a phone: they scroll inside their box, and the page stays put.
    boxes = "[...document.querySelectorAll('.box')].map((box) => box.scrollWidth > box.clientWidth)"
    assert width > 390 or any(browser.run(boxes))
    assert browser.run("document.documentElement.scrollWidth <= innerWidth && innerWidth") == width
    plots = "[...document.querySelectorAll('svg')].map((svg) => svg.getBoundingClientRect().right)"
    assert max(browser.run(plots)) <= width and len(browser.run(plots)) == 13
    ink, paper = browser.run(
        "{ const { color, backgroundColor } = getComputedStyle(document.body); [color, backgroundColor] }"
    )
    assert (sum(_channels(ink)) > sum(_channels(paper))) == dark
    assert browser.run("getComputedStyle(document.querySelector('svg text')).fill") == ink


def test_it_asks_the_network_for_nothing_and_raises_nothing(browser, report):
    browser.open(report, 1280)
    assert {address.split(":")[0] for address in browser.requests} <= {"file", "data"}
    assert {address for address in browser.requests if address.startswith("file:")} == {report.as_uri()}
    assert browser.errors == []


def _channels(colour):
    return [int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
