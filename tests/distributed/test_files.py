"""Files outlive the layout: an adapter is the same file whoever writes it, and a run goes on under another layout."""

import pytest
import torch
import world
from test_layouts import CASES, LAYOUTS, files  # noqa: F401, the fixture

SAVED = ["LoRA", "TL6", "VeRA", "ShareLoRA", "CondLoRA", "DynaLoRA", "TL6 with DoRA and LoRA+", "LoRA-XS", "Uni-LoRA"]
METHODS = ["TL6", "CondLoRA", "DynaLoRA", "LoRA-XS"]
#: Layout → the runs that go on under it, and the layout they began with.
RESUMED = {
    "alone": dict.fromkeys([*METHODS, "TL6, distributed optimizer"], "alone"),
    "PP2": dict.fromkeys(METHODS, "alone"),
    "DP2": {"TL6, distributed optimizer": "alone"},
    "TP2": dict.fromkeys(METHODS, "PP2") | {"TL6, distributed optimizer": "DP2"},
}
HALF, WHOLE = 5, 10
#: What `make test` runs of that: every method, under one layout or the other.
QUICKLY_SAVED = {
    "TP2": ["TL6", "CondLoRA", "TL6 with DoRA and LoRA+", "LoRA-XS"],
    "PP2": ["LoRA", "VeRA", "ShareLoRA", "DynaLoRA"],
}
QUICKLY_RESUMED = {
    "PP2": ["DynaLoRA"],
    "DP2": ["TL6, distributed optimizer"],
    "TP2": ["CondLoRA", "TL6, distributed optimizer", "LoRA-XS"],
}


def pairs(names, quick):
    """Layouts with their cases, as test parameters."""
    return [
        pytest.param(layout, name, marks=[] if name in quick[layout] else [pytest.mark.thorough])
        for layout in quick
        for name in names[layout]
    ]


def wanted(request, *tests):
    """Layouts and cases of those of these tests that are run now."""
    params = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and item.originalname in tests
    ]
    return {(each.get("layout", "alone"), each["name"]) for each in params}


@pytest.fixture(scope="module")
def runs(request, files, tmp_path_factory):  # noqa: F811
    """Saved adapters, and training checkpoints that go from layout to layout.

    Returns:
        The folder with a folder for each layout, and every layout's records.
    """
    saved = wanted(request, "test_an_adapter_is_the_same_file_under_every_layout")
    saved |= {("alone", name) for _, name in saved}
    going_on = "test_a_run_goes_on_under_another_layout", "test_a_resumed_run_on_the_same_layout_is_the_undisturbed_one"
    resumed = sorted(wanted(request, *going_on))
    begun = {(source, name) for layout, name in resumed for source in ("alone", RESUMED[layout][name])}
    folder = tmp_path_factory.mktemp("files")
    records = {}
    for layout in RESUMED:
        (folder / layout).mkdir()
        processes, overrides = LAYOUTS.get(layout, (1, {}))
        cases = {name: saving(folder, name, layout) for name in SAVED if (layout, name) in saved}
        for name in sorted(name for source, name in begun if source == layout):
            cases[f"{name} whole"] = whole(name) | {"checkpoint": checkpoint(folder / layout, name)}
        for name in (name for under, name in resumed if under == layout):
            source = RESUMED[layout][name]
            cases[f"{name} resumed"] = whole(name) | {"resume": checkpoint(folder / source, name)[0]}
        records[layout] = world.run(folder / layout / "run", cases, files, processes, overrides)
    return folder, records


def whole(name):
    return CASES[name] | {"steps": WHOLE}


def saving(folder, name, layout):
    """A case that trains an adapter and saves it; or loads and saves that one."""
    saved = {"save": str(folder / layout / f"{name}.nemo")}
    trained = {"steps": 2} if layout == "alone" else {"steps": 0, "load": str(folder / "alone" / f"{name}.nemo")}
    return CASES[name] | trained | saved


def checkpoint(folder, name):
    return str(folder / f"{name.replace(' ', '')}-step={HALF}-consumed_samples={4 * HALF}.0.ckpt"), HALF


@pytest.mark.parametrize(("layout", "name"), pairs(dict.fromkeys(QUICKLY_SAVED, SAVED), QUICKLY_SAVED))
def test_an_adapter_is_the_same_file_under_every_layout(runs, layout, name):
    folder, _ = runs
    assert (folder / layout / f"{name}.nemo").read_bytes() == (folder / "alone" / f"{name}.nemo").read_bytes()


@pytest.mark.parametrize(("layout", "name"), pairs(RESUMED, QUICKLY_RESUMED))
def test_a_run_goes_on_under_another_layout(runs, layout, name):
    """Optimizer state included."""
    _, records = runs
    whole, resumed = records["alone"][f"{name} whole"][0], records[layout][f"{name} resumed"][0]
    assert len(resumed["losses"]) == WHOLE - HALF
    assert resumed["losses"] == pytest.approx(whole["losses"][HALF:], rel=1e-5)
    assert resumed["grad_norms"] == pytest.approx(whole["grad_norms"][HALF:], rel=5e-5)
    assert choices(resumed) == choices(whole)


def choices(record):
    return [entry["active"] for entry in record.get("history", {}).get("log", [])]


@pytest.mark.parametrize("name", RESUMED["alone"])
def test_a_resumed_run_on_the_same_layout_is_the_undisturbed_one(runs, name):
    _, records = runs
    whole, resumed = records["alone"][f"{name} whole"][0], records["alone"][f"{name} resumed"][0]
    assert resumed["losses"] == whole["losses"][HALF:]
    for key, tensor in whole["tensors"].items():
        assert torch.equal(resumed["tensors"][key], tensor), key
