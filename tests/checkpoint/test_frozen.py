"""Adapters with frozen factors on other machines, and those that earlier versions wrote."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from nemo_tiedlora import console
from nemo_tiedlora.checkpoint import Adapter, read, write
from nemo_tiedlora.checkpoint.merge import Changes
from nemo_tiedlora.errors import UsageError

HERE = Path(__file__).parent
#: What the version before rules recorded of VeRA at seed 1234 on the base of these tests, by the CPU's capability.
RECORDED = {
    "default": {
        "attention_qkv.A": "d5921d7e1174022d5c817b4784982d5952c24c762a49dfdf56441b025c972ce6",
        "attention_qkv.B": "20377670530649f99dfc2dd9012adbff121ee8df849cec31dc4ae566c03ae9ed",
    },
    "avx2": {
        "attention_qkv.A": "bc7bdd594ce83bf08542422f66d00d51945be11ea2c097d1ffbca1afdf35bf73",
        "attention_qkv.B": "ec92a7fde5baebffeb3a00dbd18a6104578c252b97428fdce2f29cadfdaa8722",
    },
}


def run(best: bool, *folders: Path) -> tuple[list[dict], list[str]]:
    """machine.py with all that the CPU can do, or with what every CPU of its kind can: its digests, and its notes."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "ATEN_CPU_CAPABILITY")}
    environment |= {"PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
    if not best:
        features = numpy.core._multiarray_umath
        known = [name for name in features.__cpu_dispatch__ if features.__cpu_features__[name]]
        environment |= {"ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": " ".join(known)}
    command = [sys.executable, HERE / "machine.py", *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()


def test_an_adapter_written_on_one_machine_is_read_on_another(tmp_path):
    plain, best, third = (tmp_path / name for name in ("plain", "best", "third"))
    (of_plain,), notes = run(False, plain)
    assert not notes and len(of_plain) >= 9
    (of_best, plain_on_best), notes = run(True, best, plain)
    assert of_best == of_plain
    assert {name: plain_on_best[name] for name in of_plain} == of_plain
    assert len(notes) == 1 and "agree with those that the adapter was trained against to 1e-05" in notes[0]
    (_, best_on_plain), notes = run(False, third, best)
    assert {name: best_on_plain[name] for name in of_plain} == of_plain
    assert len(notes) == 1
    for path in plain.rglob("*"):  # the old rule's checksums are each machine's own
        if path.is_file() and not path.parent.name.startswith("old"):
            assert path.read_bytes() == (best / path.relative_to(plain)).read_bytes()


@pytest.fixture
def notes(capsys):
    """What was said on standard error."""
    console.note.cache_clear()
    return lambda: capsys.readouterr().err.splitlines()


def old(make, recorded) -> Adapter:
    adapter = make("vera", drawing_rule=1)
    settings = {name: value for name, value in adapter.settings.items() if name != "drawing_rule"}
    return replace(adapter, settings=settings | {"checksums": recorded})


@pytest.mark.parametrize("capability", RECORDED)
def test_a_file_of_an_earlier_version_is_read_with_one_line_and_stays_one(make, same, notes, tmp_path, capability):
    adapter = old(make, RECORDED[capability])
    write(adapter, tmp_path / "a")
    found = read(tmp_path / "a")
    assert not notes()
    frozen = Changes(found).tensors
    assert len(notes()) == 1
    for key, (spec, _) in found.specs.items():
        if not spec.trained:
            assert torch.equal(frozen[key], spec.init.draw(found.shapes[key], 1234, key, rule=1))
    write(found, tmp_path / "again")
    again = read(tmp_path / "again")
    assert same(again, adapter) and again.config.drawing_rule == 1


@pytest.mark.parametrize("rule", [1, 2])
@pytest.mark.parametrize(
    "change", [{"seed": 1235}, {"init_A": "xavier"}, {"init_A": "kaiming_uniform"}, {"std_B": 2.0}]
)
def test_a_real_mismatch_is_refused(make, notes, rule, change):
    adapter = make("vera", drawing_rule=rule)
    adapter.drawn()
    changed = replace(adapter, settings=adapter.settings | change)
    with pytest.raises(UsageError, match="not the one this adapter was trained against") as error:
        changed.drawn()
    assert "\n" not in str(error.value)


def test_the_other_rule_is_a_real_mismatch(make):
    adapter = make("vera")
    assert adapter.settings["drawing_rule"] == 2
    with pytest.raises(UsageError, match="drawn from it by rule 1 is not the one"):
        replace(adapter, settings=adapter.settings | {"drawing_rule": 1}).drawn()
    without = {name: value for name, value in adapter.settings.items() if name != "drawing_rule"}
    with pytest.raises(UsageError, match="drawn from it by rule 1 is not the one"):
        replace(adapter, settings=without).drawn()


def test_what_is_stored_is_not_drawn_again(make):
    assert make("tied_lora", preset="TL1").settings["drawing_rule"] == 2
    stored = make("vera", store_frozen=True)
    assert torch.equal(replace(stored, tensors=stored.tensors | {"attention_qkv.A": torch.ones(4, 32)})
                       .drawn()["attention_qkv.A"], torch.ones(4, 32))  # fmt: skip
