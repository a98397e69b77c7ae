"""Files outlive the layout: an adapter is the same file whoever writes it, and a run goes on under another layout."""

import pytest
import torch
import world
from test_layouts import CASES, LAYOUTS, files  # noqa: F401, the fixture

SAVED = ["LoRA", "TL6", "VeRA", "ShareLoRA", "CondLoRA", "DynaLoRA", "DoRA and LoRA+"]
RESUMED = ["TL6", "CondLoRA", "DynaLoRA"]
HALF, WHOLE = 10, 20


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):  # noqa: F811
    """Saved adapters and training checkpoints that go from one process to two stages, and from these to two ranks.

    Returns:
        The folder with a folder for each layout, and every layout's records.
    """
    folder = tmp_path_factory.mktemp("files")
    records = {}
    for layout, source, further in (("alone", "alone", "PP2"), ("PP2", "alone", "TP2"), ("TP2", "PP2", None)):
        (folder / layout).mkdir()
        processes, overrides = LAYOUTS.get(layout, (1, {}))
        cases = {name: saving(folder, name, layout) for name in SAVED}
        if further:  # checkpoints of whole runs under this layout, for the next one
            cases |= {
                f"{name} whole": CASES[name] | {"checkpoint": checkpoint(folder / layout, name)} for name in RESUMED
            }
        for name in RESUMED:
            cases[f"{name} resumed"] = CASES[name] | {"resume": checkpoint(folder / source, name)[0]}
        records[layout] = world.run(folder / layout / "run", cases, files, processes, overrides)
    return folder, records


def saving(folder, name, layout):
    """A case that trains an adapter and saves it; or loads and saves that one."""
    saved = {"save": str(folder / layout / f"{name}.nemo")}
    trained = {"steps": 2} if layout == "alone" else {"steps": 0, "load": str(folder / "alone" / f"{name}.nemo")}
    return CASES[name] | trained | saved


def checkpoint(folder, name):
    return str(folder / f"{name.replace(' ', '')}-step={HALF}-consumed_samples={4 * HALF}.0.ckpt"), HALF


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_an_adapter_is_the_same_file_under_every_layout(runs, layout, name):
    folder, _ = runs
    assert (folder / layout / f"{name}.nemo").read_bytes() == (folder / "alone" / f"{name}.nemo").read_bytes()


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("layout", ["PP2", "TP2"])
def test_a_run_goes_on_under_another_layout(runs, layout, name):
    """From one process to two pipeline stages, and from two stages to two tensor ranks; optimizer state included."""
    _, records = runs
    whole, resumed = records["alone"][f"{name} whole"][0], records[layout][f"{name} resumed"][0]
    assert len(resumed["losses"]) == WHOLE - HALF
    assert resumed["losses"] == pytest.approx(whole["losses"][HALF:], rel=1e-4)
    assert resumed["grad_norms"] == pytest.approx(whole["grad_norms"][HALF:], rel=1e-3)
    assert choices(resumed) == choices(whole)


def choices(record):
    return [entry["active"] for entry in record.get("history", {}).get("log", [])]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_on_the_same_layout_is_the_undisturbed_one(runs, name):
    _, records = runs
    whole, resumed = records["alone"][f"{name} whole"][0], records["alone"][f"{name} resumed"][0]
    assert resumed["losses"] == whole["losses"][HALF:]
    for key, tensor in whole["tensors"].items():
        assert torch.equal(resumed["tensors"][key], tensor), key
