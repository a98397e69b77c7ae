"""Entering and leaving: nothing happens at import, everything is put back."""

import os
import subprocess
import sys

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from nemo_tiedlora import platform, register, unregister
from nemo_tiedlora.platform.patch import _ABSENT, Restore


def test_import_is_cheap():
    code = "import sys, nemo_tiedlora.platform; sys.exit(any(name in sys.modules for name in ('nemo', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_exit_restores_every_attribute(nemo, monkeypatch):
    replaced = []
    set_attribute = Restore.set

    def record(self, owner, name, value):
        replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
        set_attribute(self, owner, name, value)

    def state():
        return [dict(vars(thing)) for thing in (torch, torch.cuda, torch.Tensor, torch.nn.Module)]

    monkeypatch.setattr(Restore, "set", record)
    environment, modes, before = dict(os.environ), list(_get_current_function_mode_stack()), state()
    with platform.host() as host:
        assert host.applied == tuple(patch.name for patch in platform.patches() if patch.name in host.applied)
        assert any(vars(owner).get(name, _ABSENT) is not value for owner, name, value in replaced)
    assert len(replaced) > 40
    # An attribute replaced twice is recorded twice; only its first record is the stock one.
    first = {(id(owner), name): (owner, name, value) for owner, name, value in reversed(replaced)}
    for owner, name, value in first.values():
        assert vars(owner).get(name, _ABSENT) is value, (owner, name)
    assert dict(os.environ) == environment
    assert _get_current_function_mode_stack() == modes
    for now, then in zip(state(), before, strict=True):
        assert now.keys() == then.keys()
        assert all(now[name] is then[name] for name in now)


def test_leaving_undoes_nothing_that_schemes_replace(nemo):
    """Schemes are registered inside the host or before it is entered, and stay registered when it is left."""

    def replaced():
        classes = (NLPAdapterModelMixin, NLPSaveRestoreConnector, NLPDDPStrategy)
        return {(owner, name): value for owner in classes for name, value in vars(owner).items()}

    with platform.host():
        from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
        from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy, NLPSaveRestoreConnector

        unregister()
        stock = replaced()
        register()
        ours = {key: value for key, value in replaced().items() if value is not stock.get(key)}
    assert len(ours) == 10
    assert all(vars(owner)[name] is value for (owner, name), value in ours.items())


def test_a_failing_patch_leaves_nothing_behind(nemo, monkeypatch):
    def fail(restore):
        raise OSError

    patches = (*platform.patches(), platform.Patch("broken", "", lambda: True, fail))
    monkeypatch.setattr(platform, "patches", lambda: patches)
    cuda = vars(torch.Tensor).get("cuda")
    with pytest.raises(OSError):
        platform.enter()
    assert vars(torch.Tensor).get("cuda") is cuda
    assert not _get_current_function_mode_stack()


def test_entering_is_counted(nemo):
    host = platform.enter()
    with platform.host() as again:
        assert again is host
    assert host.applied
    host.exit()
    assert not host.applied
    with pytest.raises(RuntimeError, match="not entered"):
        host.exit()


def test_every_patch_says_why():
    names = [patch.name for patch in platform.patches()]
    assert len(set(names)) == len(names)
    assert all(len(patch.reason) > 40 for patch in platform.patches())


def test_torch_compile_works_inside(host):
    # One function object under two torch.cuda names would make dynamo refuse to start.
    assert torch.compile(lambda x: x * 2 + 1, backend="eager")(torch.ones(2)).tolist() == [3, 3]


def test_no_patch_where_the_real_thing_is(nemo, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("NVIDIA_PYTORCH_VERSION", "25.07")
    needed = {patch.name for patch in platform.patches() if patch.needed()}
    assert not {name for name in needed if name.split("_")[0] in ("cuda", "apex", "transformer", "jit")}
    assert "container_version" not in needed
