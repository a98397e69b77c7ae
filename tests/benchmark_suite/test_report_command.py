"""The ``report`` command and what it writes."""

import csv
import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from report_results import write

NASTY = "<script>alert('x')</script>|*$a_b$*"


def run(*arguments):
    command = [sys.executable, "-m", "benchmark_suite.report", *map(str, arguments)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}  # a locale that lacks our letters
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")


@pytest.fixture
def results(tmp_path):
    for seed in (0, 1):
        write(tmp_path / "results" / f"a{seed}", [1, 0, 1, seed], seed=seed)
        write(tmp_path / "results" / f"b{seed}", [0, 0, 1, seed], seed=seed, variant=NASTY, trainable=100)
    write(tmp_path / "results" / "c", status="failed", error="<b>no</b>", task="squad-v1")
    return tmp_path / "results"


def test_all_formats(results, tmp_path):
    paths = [tmp_path / f"out.{kind}" for kind in ("html", "md", "csv")]
    done = run(results, "--html", paths[0], "--markdown", paths[1], "--csv", paths[2])
    assert done.returncode == 0, done.stderr
    assert "Best rank, by task and variant" in done.stdout and NASTY in done.stdout and "<b>no</b>" in done.stdout

    rows = list(csv.DictReader(paths[2].open(newline="", encoding="utf-8")))
    assert [(row["variant"], row["score"], row["trainable"]) for row in rows] == [
        (NASTY, "37.5", "100"),
        ("LoRA", "62.5", "1000"),
    ]

    markdown = paths[1].read_text(encoding="utf-8")
    line = next(line for line in markdown.splitlines() if "alert" in line)
    assert r"\<script\>alert('x')\</script\>\|\*\$a\_b\$\*" in line
    assert "| LoRA | **62.50 ± 17.68** (r 8 · 100.0 %) |" in markdown


def test_the_page_escapes_what_comes_from_files(results, tmp_path):
    page = tmp_path / "out.html"
    assert run(results, "--html", page).returncode == 0

    class Reader(HTMLParser):
        tags, text = [], ""

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            for name, value in attributes:
                assert not name.startswith("on") and (name == "xmlns:xlink" or name != "src")
                if name in ("href", "xlink:href"):
                    assert value.startswith(("#", "data:,"))

        def handle_data(self, data):
            self.text += data

    html = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(html)
    assert reader.tags.count("script") == 1 and "b" not in reader.tags
    assert NASTY in reader.text and "<b>no</b>" in reader.text
    identities = [part.split('"')[0] for part in html.split(' id="')[1:]]
    assert len(identities) == len(set(identities))


def test_json(results):
    done = run(results, "--json")
    report = json.loads(done.stdout)
    (base,) = report["bases"]
    assert report["against"] == "LoRA" and base["base"] == "tiny.nemo" and report["failed"][0]["error"] == "<b>no</b>"
    (test,) = base["tables"]["significance"]
    assert test["difference"] == -25 and test["examples"] == 4 and test["seeds"] == [0, 1]


def test_the_report_does_not_depend_on_when_it_is_made(results, tmp_path):
    for name in ("one", "two"):
        assert run(results, "--html", tmp_path / name).returncode == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "error: results='missing': no such folder\n"),
        (["{results}", "--against", "Lora"], "error: against='Lora': did you mean 'LoRA'? "),
        (["{results}", "--html", "{results}"], "Is a directory\n"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(results, arguments, message):
    done = run(*(argument.format(results=results) for argument in arguments))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_nothing_evaluated_yet_is_said(tmp_path):
    write(tmp_path / "results" / "c", status="failed", error="out of memory")
    done = run(tmp_path / "results", "--html", tmp_path / "out.html")
    assert done.returncode == 0 and "1 failed" in done.stdout and "out of memory" in done.stdout
    assert "No cell has been evaluated" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from benchmark_suite.report import command;"
        "sys.exit(any(name in sys.modules for name in ('numpy', 'scipy', 'matplotlib', 'jinja2', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
