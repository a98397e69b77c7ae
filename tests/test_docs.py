"""What the docs and the package's papers say of other files: names, links, versions."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from nemo_tiedlora import __version__
from nemo_tiedlora.variants import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = ("nemo_tiedlora", "benchmark_suite", "benchmarks", "conf", "docs", "examples", "tests", "tools")


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What a link can end in: headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_named_file_is_there(page):
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target
    for name in re.findall(rf"(?<![\w/.])((?:{'|'.join(FOLDERS)})/[\w/.-]*\w)", text):
        assert (ROOT / name).exists(), name


def test_the_version_is_the_same_in_every_file():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == __version__
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text()).get("project", {})


def test_every_method_names_its_paper_and_the_citation_has_it():
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for method in METHODS.values():
        first = sys.modules[method.variant.__module__].__doc__.splitlines()[0]
        assert re.search(r"\(.*\b(arXiv:\d{4}\.\d{5}|no arXiv id)\b", first), first
        for number in re.findall(r"arXiv:\d{4}\.\d{5}", first):
            assert number in cited


def test_the_tables_of_what_was_served_are_those_of_its_results():
    runs = json.loads((ROOT / "docs" / "serving.json").read_text(encoding="utf-8"))["runs"]
    served = [
        f"| {name} | {run['date']} | {run['vllm']} | {run['requests']} | {run['equal_tokens']} of {run['tokens']} |"
        for name, run in runs.items()
    ]
    weighed = [
        f"| {name} | {adapter['bytes']:,} | {adapter['peft_bytes']:,} |"
        for name, adapter in runs["smollm2, engine"]["adapters"].items()
    ]
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for rows in (served, weighed):
        assert "|---|\n" + "\n".join(rows) + "\n\n" in page


def test_the_table_of_conversion_matrices_is_that_of_its_results():
    trained, drawn = (
        json.loads((ROOT / "docs" / f"{name}.json").read_text(encoding="utf-8"))["targets"]
        for name in ("conversion", "conversion-drawn")
    )
    rows = []
    for target in trained:
        for factor in "AB":
            found = [trained[target][factor], drawn[target][factor], trained[target][f"random {factor}"]]
            cells = [target.rpartition(".")[2], factor, *(f"{one['average']:.3f}" for one in found)]
            rows.append(f"| {' | '.join(cells)} |")
    page = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
    assert "|---:|\n" + "\n".join(rows) + "\n\n" in page


def test_the_glossary_says_every_word_once():
    words = re.findall(r"^\| ([^|]+) \|", prose(ROOT / "docs" / "glossary.md"), re.MULTILINE)
    words = [word for word in words if word != "word"]
    assert words and len(words) == len(set(words))
