"""Who imports whom, compared with the table of docs/architecture.md."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def table():
    """Room → the rooms that it may import, in the table's order."""
    rooms: dict[str, set[str]] = {}
    ground: set[str] = set()
    for named, allowed in re.findall(r"^\| (`[^|]+`) \|[^|]+\| ([^|]+) \|$", PAGE, re.MULTILINE):
        names = re.findall(r"`(\w+)`", named)
        ground = ground or set(names)
        above = set(rooms) if allowed == "all above" else set(re.findall(r"\w+", allowed))
        for name in names:
            rooms[name] = above | ground | set(names)
    return rooms


ROOMS = table()


def modules(package):
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imported(path, known):
    """Every module of ``known`` that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                name = whole if whole in known else node.module
                if name in known:
                    yield name
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


OURS = modules("nemo_tiedlora")


def room(module):
    return module.split(".")[1] if "." in module else ""


def test_every_folder_and_module_is_a_room():
    assert {room(name) for name in OURS} - {"", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_what_the_table_allows(name):
    for module, path in OURS.items():
        if room(module) == name:
            for other in imported(path, OURS):
                if room(other):  # the package itself only has its version and the doors
                    assert room(other) in ROOMS[name], f"{module} imports {other}"


def test_there_are_no_circles():
    # What is imported inside a function counts too: it would be a circle of rooms all the same.
    between = {name: {other for other in ROOMS[name] if other != name} for name in ROOMS}
    used = {name: set() for name in ROOMS}
    for module, path in OURS.items():
        if room(module) in ROOMS:
            used[room(module)] |= {room(other) for other in imported(path, OURS)} & between[room(module)]
    list(TopologicalSorter(used).static_order())


def test_the_suite_uses_the_facade_only():
    for path in modules("benchmark_suite").values():
        assert set(imported(path, OURS)) <= {"nemo_tiedlora.facade"}, path


def test_the_facade_has_the_names_it_lists():
    from nemo_tiedlora import facade

    shown = {node.asname or node.name for node in ast.walk(ast.parse(OURS["nemo_tiedlora.facade"].read_text()))
             if isinstance(node, ast.alias)} - {"import_module", "TYPE_CHECKING", "Any"}  # fmt: skip
    assert shown == set(facade.__all__) == set(facade._HOMES)
    for name, (module, attribute) in facade._HOMES.items():
        if "job" not in module:  # which imports NeMo
            assert getattr(facade, name) is getattr(__import__(module, fromlist=[attribute]), attribute)
    with pytest.raises(AttributeError, match="nothing"):
        facade.nothing  # noqa: B018


def test_a_setting_takes_ten_files_from_the_config_to_the_product():
    files = re.findall(r"^\d+\. `([\w/.]+)`", PAGE.partition("## From YAML")[2], re.MULTILINE)
    assert len(files) == 10
    for name in files:
        assert (ROOT / name).is_file() or (ROOT / "nemo_tiedlora" / name).is_file(), name
