"""Files outlive the layout: an adapter is the same file whoever writes it, and a run goes on under another layout."""

import pytest
import torch
import world
from test_layouts import CASES, LAYOUTS, files  # noqa: F401, the fixture

SAVED = ["LoRA", "TL6", "VeRA", "ShareLoRA", "CondLoRA", "DynaLoRA", "DoRA and LoRA+"]
RESUMED = ["TL6", "CondLoRA", "DynaLoRA"]
HALF, WHOLE = 10, 20


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):  # noqa: F811
    """Saved adapters, checkpoints after half the steps, and what whole runs gave, from one process."""
    folder = tmp_path_factory.mktemp("alone")
    cases = {name: CASES[name] | {"steps": 2, "save": str(folder / f"{name}.nemo")} for name in SAVED}
    cases |= {f"{name} resumed": CASES[name] | {"checkpoint": checkpoint(folder, name)} for name in RESUMED}
    return folder, world.run(folder / "run", cases, files, 1, {})


def checkpoint(folder, name):
    return str(folder / f"{name.replace(' ', '')}-step={HALF}-consumed_samples={4 * HALF}.0.ckpt"), HALF


@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_an_adapter_is_the_same_file_under_every_layout(alone, files, tmp_path, layout):  # noqa: F811
    folder, _ = alone
    processes, overrides = LAYOUTS[layout]
    cases = {
        name: CASES[name] | {"steps": 0, "load": str(folder / f"{name}.nemo"), "save": str(tmp_path / f"{name}.nemo")}
        for name in SAVED
    }
    world.run(tmp_path / "run", cases, files, processes, overrides)
    for name in SAVED:
        assert (tmp_path / f"{name}.nemo").read_bytes() == (folder / f"{name}.nemo").read_bytes()


def test_a_run_goes_on_under_another_layout(alone, files, tmp_path):  # noqa: F811
    """From one process to two pipeline stages, and from two stages to two tensor ranks; optimizer state included."""
    folder, records = alone
    for layout, source, target in (("PP2", folder, tmp_path), ("TP2", tmp_path, None)):
        processes, overrides = LAYOUTS[layout]
        cases = {}
        for name in RESUMED:
            cases[name] = CASES[name] | {"resume": checkpoint(source, name)[0]}
            if target:  # checkpoints of a run under this layout, for the next one
                cases[f"{name} whole"] = CASES[name] | {"checkpoint": checkpoint(target, name)}
        ranks = world.run(tmp_path / layout, cases, files, processes, overrides)
        for name in RESUMED:
            whole, resumed = records[f"{name} resumed"][0], ranks[name][0]
            assert len(resumed["losses"]) == WHOLE - HALF
            assert resumed["losses"] == pytest.approx(whole["losses"][HALF:], rel=1e-4)
            assert resumed["grad_norms"] == pytest.approx(whole["grad_norms"][HALF:], rel=1e-3)
            assert choices(resumed) == choices(whole)


def choices(record):
    return [entry["active"] for entry in record.get("history", {}).get("log", [])]


def test_a_resumed_run_on_the_same_layout_is_the_undisturbed_one(alone, files, tmp_path):  # noqa: F811
    folder, records = alone
    cases = {name: CASES[name] | {"resume": checkpoint(folder, name)[0]} for name in RESUMED}
    ranks = world.run(tmp_path / "run", cases, files, 1, {})
    for name in RESUMED:
        whole, resumed = records[f"{name} resumed"][0], ranks[name][0]
        assert resumed["losses"] == whole["losses"][HALF:]
        for key, tensor in whole["tensors"].items():
            assert torch.equal(resumed["tensors"][key], tensor), key
