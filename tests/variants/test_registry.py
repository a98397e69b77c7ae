"""The list of methods: what feeds from it, what it refuses, and methods of somebody's own."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from stack import Layers

from nemo_tiedlora import attach, own_methods
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import METHODS, PRESETS, Method, Site, Tied, TiedConfig, build, config_for
from nemo_tiedlora.variants.allocate import ALLOCATORS, Name
from nemo_tiedlora.variants.base import Factors, Variant, Wrapper
from nemo_tiedlora.variants.init import STD, Distribution
from nemo_tiedlora.variants.tied import Preset

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "conf" / "megatron_gpt_finetuning_config.yaml"
#: Settings that a method has without any effect, and that its section leaves out.
NO_EFFECT = {
    "cond_lora": {"init_B", "std_B"},
    "lora_xs": {"init_A", "init_B", "std_A", "std_B"},
    "uni_lora": {"init_A", "init_B", "std_A", "std_B"},
    "vera": {"preset", "train", "tie", "init_scheme"},  # they would make it another method
    "dyna_lora": {"init_A", "init_B", "std_A", "std_B"},  # of the inner method: in settings
}


CALLED = (
    "tensors", "factors", "computed", "decided", "final_at_merge", "start", "observe", "check",
    "active_keys", "advance", "state_dict", "load_state_dict", "history",
)  # fmt: skip


@pytest.fixture
def added():
    """Adds a method for the time of a test."""
    names = []

    def add(method):
        METHODS.add(method)
        names.append(method.scheme)

    yield add
    for name in names:
        METHODS._known.pop(name)


@pytest.mark.parametrize("scheme", METHODS)
def test_the_configs_section_has_every_setting_with_its_default(scheme):
    section = yaml.safe_load(CONFIG.read_text())["model"]["peft"][f"{scheme}_tuning"]
    settings = METHODS[scheme].settings()
    left_out = NO_EFFECT.get(scheme, set()) | {"checksums"}
    assert section | {"seed": 1234} == {name: value for name, value in settings.items() if name not in left_out}
    assert section["seed"] == "${model.seed}"


def test_the_help_the_readme_and_the_suite_know_every_method():
    from benchmark_suite import list_variants, variant
    from nemo_tiedlora.job.script_help import MOST_USED

    assert [f"model.peft.{scheme}_tuning" for scheme in METHODS] == [name for name in MOST_USED if "_tuning" in name]
    table = (ROOT / "README.md").read_text().partition("## Schemes")[2].partition("All take")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(METHODS)
    assert set(METHODS) <= {variant(name).scheme for name in list_variants()}


def test_a_name_means_one_method():
    for taken in ("tied_lora", "lora", "ia3"):
        with pytest.raises(UsageError, match=f"scheme='{taken}': there is a method of this name already"):
            METHODS.add(Method(taken, TiedConfig, Tied, "another"))
    with pytest.raises(UsageError, match="scheme='my lora': must be a name"):
        METHODS.add(Method("my lora", TiedConfig, Tied, "mine"))


def test_two_methods_can_have_the_same_settings(added):
    class Doubled(Tied):
        @property
        def scale(self):
            return 2 * super().scale

    added(Method("doubled", TiedConfig, Doubled, "twice as much"))
    assert type(build(config_for("doubled", {}), 4)) is Doubled
    assert type(build(config_for("tied_lora", {}), 4)) is Tied
    assert type(build(config_for("vera", {}), 4)) is Tied
    assert type(build(config_for("dyna_lora", {"inner": "doubled"}), 4).inner) is Doubled


def test_a_wrapper_leaves_everything_else_to_what_it_wraps():
    class Inner(Tied):
        reads_weight = changes_with_step = True
        takes_turns = False
        observes = True

        def __init__(self):
            super().__init__(TiedConfig(rank=3, seed=7, drawing_rule=1), 4)
            self.calls = []

        def __getattribute__(self, name):
            if name in CALLED:
                object.__getattribute__(self, "calls").append(name)
                return lambda *_: name
            return super().__getattribute__(name)

    inner = Inner()
    wrapper = Wrapper(TiedConfig(), inner)
    assert (wrapper.rank, wrapper.seed, wrapper.drawing_rule, wrapper.scale) == (3, 7, 1, 1.0)
    assert wrapper.reads_weight and wrapper.changes_with_step and wrapper.observes and not wrapper.takes_turns
    site = Site("q", 0, 4, 4)
    wrapper.tensors(site), wrapper.factors(site, {}, None), wrapper.computed(site, None), wrapper.decided()
    wrapper.final_at_merge(), wrapper.start([site]), wrapper.observe(site, torch.zeros(1)), wrapper.check(site)
    wrapper.active_keys(), wrapper.advance(), wrapper.state_dict(), wrapper.load_state_dict({}), wrapper.history()
    assert tuple(inner.calls) == CALLED
    public = {name for name in vars(Variant) if not name.startswith("_")} - {"trained_at_once", "scale", "config"}
    assert public <= {*CALLED, "reads_weight", "changes_with_step", "takes_turns", "observes", "parts", "own_schedules"}


def test_a_setting_of_its_own_is_checked_like_any_other(added):
    @dataclass(kw_only=True)
    class Config(TiedConfig):
        scheme: str = "mine"
        warmth: float = 0.5

    class Mine(Tied):
        def factors(self, site, tensors, weight):
            A, B, *rest = super().factors(site, tensors, weight)
            return Factors(A, self.config.warmth * B, *rest)

    added(Method("mine", Config, Mine, "mine", {"preset": "TL5"}))
    config = config_for("mine", {"rank": 2, "warmth": 0.25})
    assert (config.scheme, config.preset, config.warmth) == ("mine", "TL5", 0.25)
    with pytest.raises(UsageError, match="wormth=1: unknown setting; did you mean 'warmth'"):
        config_for("mine", {"wormth": 1})
    torch.manual_seed(0)
    model = Layers()
    adapter = attach(model, config, ["qkv"])
    named = adapter.named_tensors()
    with torch.no_grad():
        named["qkv.B"].normal_()
    x = torch.randn(4, 6, dtype=torch.float64)
    first = model.layers[0]["qkv"]
    with adapter.disabled():
        expected = first(x) + 0.25 * x @ named["qkv.A"].T @ named["qkv.B"].T
    torch.testing.assert_close(first(x), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such Python file"),
        ("x = 1\n", "adds no method"),
        ("x =\n", "does not run: SyntaxError"),
        ("import nothing_of_this_name\n", "does not run: ModuleNotFoundError: No module named"),
        (
            "from nemo_tiedlora.variants import *\nMETHODS.add(Method('vera', TiedConfig, Tied, ''))\n",
            "there is a method of this name already",
        ),
    ],
)
def test_a_bad_file_of_methods_is_one_line(tmp_path, content, message):
    path = tmp_path / "core.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        own_methods.take(["--methods", str(path)])
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_the_option_is_taken_out_of_a_command_line(tmp_path, added):
    path = tmp_path / "mine.py"
    path.write_text("from nemo_tiedlora.variants import *\nMETHODS.add(Method('my_own', TiedConfig, Tied, 'mine'))\n")
    try:
        left = own_methods.take(["params", "--methods", str(path), "--rank", "4", f"--methods={path}", "x=--methods"])
        assert left == ["params", "--rank", "4", "x=--methods"] and "my_own" in METHODS
        with pytest.raises(UsageError, match="name a Python file"):
            own_methods.take(["--methods"])
    finally:
        METHODS._known.pop("my_own", None)
        own_methods.LOADED.clear()


def test_an_installed_package_brings_its_methods_and_a_broken_one_harms_no_other(tmp_path):
    (tmp_path / "my_package.py").write_text(
        "from nemo_tiedlora.variants import *\nMETHODS.add(Method('packed_lora', TiedConfig, Tied, 'packed'))\n"
    )
    for name, module in (("mine", "my_package"), ("broken", "not_there")):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[nemo_tiedlora.methods]\n{name} = {module}\n")
    done = subprocess.run(
        [sys.executable, "-m", "nemo_tiedlora.cli", "params", "--scheme=packed_lora", "--layers=2", "--hidden=8"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0 and "trainable" in done.stdout, done.stderr
    assert done.stderr == (
        "note: the methods of not_there could not be loaded: ModuleNotFoundError: No module named 'not_there'\n"
    )


@pytest.mark.parametrize(("names", "table"), [(Preset, PRESETS), (Name, ALLOCATORS), (Distribution, STD)])
def test_what_a_setting_may_be_called_is_what_there_is(names, table):
    assert get_args(names) == tuple(table)
