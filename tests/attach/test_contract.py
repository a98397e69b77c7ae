"""The training contract on a plain torch model: DynaLoRA takes turns, and what needs the optimizer says so."""

import json
import subprocess
import sys
from copy import deepcopy
from random import Random

import pytest
import torch
from stack import Layers

from nemo_tiedlora import attach
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.platform.apex import FusedAdam
from nemo_tiedlora.variants import METHODS, DynamicConfig, Method, Tied, TiedConfig

LAYERS, K, PERIOD, SEED = 5, 2, 3, 7
SETTINGS = {"rank": 2, "alpha": 3.0, "active": K, "period": PERIOD, "seed": SEED}


def batches(steps):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, 2, 4, 6, dtype=torch.float64, generator=generator)  # two micro-batches a step


def model_with_adapter(method="dyna_lora", settings=SETTINGS, layers=LAYERS):
    torch.manual_seed(0)
    return attach(Layers(layers), method, ["qkv"], **settings)


def trained(adapter, optimizer, steps):
    """Trains; returns the numbers of the active layers of every step."""
    turns = []
    for batch in batches(steps):
        turns.append(sorted(site.layer for site in getattr(adapter.variant, "active", ())))
        for x in batch:
            (adapter.model(x) - 0.3).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return turns


def reference(adapter, steps, lr):
    """DynaLoRA over LoRA written down once more: an optimizer for each layer, plain autograd, a generator of its own.

    Returns:
        The active layers of every step, and the factors A, B of every layer at the end.
    """
    bases = [layer["qkv"] for layer in adapter.model.layers]
    named = adapter.named_tensors()
    factors = [[named[f"qkv.{n}.{part}"].detach().clone().requires_grad_() for part in "AB"] for n in range(LAYERS)]
    optimizers = [torch.optim.AdamW(pair, lr, weight_decay=0.1) for pair in factors]
    random, importance, counts = Random(SEED), [0.0] * LAYERS, [1] * LAYERS

    def drawn():
        total = sum(importance)
        left = {n: (importance[n] / total if total else 1 / LAYERS) / counts[n] for n in range(LAYERS)}
        chosen = []
        for _ in range(K):
            chosen.append(random.choices(list(left), list(left.values()))[0])
            del left[chosen[-1]]
        return sorted(chosen)

    active, turns = drawn(), []
    for number, batch in enumerate(batches(steps)):
        if number and number % PERIOD == 0:
            active = drawn()
        turns.append(active)
        for x in batch:
            for n, (base, (A, B)) in enumerate(zip(bases, factors, strict=True)):
                A, B = (A, B) if n in active else (A.detach(), B.detach())
                y = x @ base.weight.T + base.bias + 1.5 * x @ A.T @ B.T
                importance[n] += y.detach().norm(dim=1).sum().item()
                x = torch.tanh(y[:, :6])
            (x - 0.3).square().sum().backward()
        for n in active:
            optimizers[n].step()
            optimizers[n].zero_grad()
            counts[n] += 1
    return turns, factors


@pytest.mark.parametrize("kind", [torch.optim.AdamW, FusedAdam])
def test_dyna_lora_takes_turns_and_trains_as_the_reference_does(kind):
    """FusedAdam counts steps per group, also those in which it has nothing to do."""
    steps, lr = 4 * PERIOD, 1e-2
    adapter = model_with_adapter()
    turns, factors = reference(adapter, steps, lr)
    optimizer = kind(adapter.parameter_groups(lr), weight_decay=0.1)
    adapter.attach_to(optimizer)
    assert trained(adapter, optimizer, steps) == turns
    assert len(set(map(tuple, turns))) > 2
    for n, pair in enumerate(factors):
        for part, expected in zip("AB", pair, strict=True):
            torch.testing.assert_close(adapter.named_tensors()[f"qkv.{n}.{part}"], expected, rtol=1e-9, atol=1e-12)


def test_its_state_continues_a_run_elsewhere():
    def begin():
        adapter = model_with_adapter(settings={**SETTINGS, "optimizer": "local"})
        optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
        return adapter, optimizer, adapter.attach_to(optimizer)

    adapter, optimizer, contract = begin()
    trained(adapter, optimizer, 4)
    saved = json.loads(json.dumps(contract.state_dict()))
    other, other_optimizer, other_contract = begin()
    other.model.load_state_dict(adapter.model.state_dict())
    other_optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    other_contract.load_state_dict(saved)
    assert other_contract.state_dict() == contract.state_dict() and saved["variant"]["step"] == 4
    assert trained(adapter, optimizer, 6) == trained(other, other_optimizer, 6)
    for key, tensor in adapter.named_tensors().items():
        assert torch.equal(tensor, other.named_tensors()[key])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DynamicConfig(rank=2), "^optimizer=None: dyna_lora takes part in every step .* call adapter.attach_to"),
        (TiedConfig(rank=2, lr_ratio=16), "^optimizer=None: lr_ratio=16 takes part in .* call adapter.attach_to"),
        (DynamicConfig(rank=2, settings={"lr_ratio": 4}), "^optimizer=None: dyna_lora"),
        (TiedConfig(rank=2, lr_ratio=4, dora=True), "^optimizer=None: lr_ratio=4"),
    ],
)
def test_what_takes_part_in_steps_says_so_before_the_first_one(method, message):
    adapter = model_with_adapter(method, {})
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
    before = {key: tensor.clone() for key, tensor in adapter.named_tensors().items()}
    for _ in range(2):  # and again, if the first was caught
        with pytest.raises(UsageError, match=message) as error:
            trained(adapter, optimizer, 1)
        assert "\n" not in str(error.value)
    contract = adapter.attach_to(optimizer)
    trained(adapter, optimizer, 1)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in adapter.named_tensors().items())
    contract.detach()
    contract.detach()
    with pytest.raises(UsageError, match=message):
        trained(adapter, optimizer, 1)
    adapter.attach_to(optimizer)
    trained(adapter, optimizer, 1)


@pytest.mark.parametrize("method", ["tied_lora", "cond_lora"])
def test_other_methods_train_with_any_optimizer_as_it_is(method):
    ends = []
    for attached in (True, False):
        adapter = model_with_adapter(method, {"rank": 2})
        optimizer = torch.optim.AdamW([p for p in adapter.model.parameters() if p.requires_grad], 1e-2, fused=True)
        if attached:
            adapter.attach_to(optimizer)
        for batch in batches(4):
            (adapter.model(batch.flatten(0, 1)) - 0.3).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(adapter.named_tensors())
    for key, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][key])


def test_an_optimizer_of_other_groups_is_refused():
    adapter = model_with_adapter()
    with pytest.raises(UsageError, match="optimizer='SGD': qkv.0.A is in none of its groups; make it of adapter.param"):
        adapter.attach_to(torch.optim.SGD(adapter.model.parameters(), 1e-2))


def test_an_optimizer_that_does_not_tell_of_its_steps_is_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.param_groups = optimizer.param_groups

    adapter = model_with_adapter()
    with pytest.raises(UsageError, match="optimizer='Wrapper': .* give the one that it wraps"):
        adapter.attach_to(Wrapper(torch.optim.SGD(adapter.parameter_groups(1e-2))))


def test_a_second_optimizer_is_refused_until_the_first_is_let_go():
    adapter = model_with_adapter()
    first, second = (torch.optim.SGD(adapter.parameter_groups(1e-2)) for _ in range(2))
    contract = adapter.attach_to(first)
    with pytest.raises(UsageError, match="optimizer='SGD': attached to one already; detach"):
        adapter.attach_to(second)
    contract.detach()
    adapter.attach_to(second)
    trained(adapter, second, 2)
    assert adapter.variant.step == 2


def test_importing_installs_no_hook_and_needs_no_torch():
    code = """
import sys, nemo_tiedlora
assert "torch" not in sys.modules
nemo_tiedlora.unregister()  # nothing was registered
import nemo_tiedlora.variants, nemo_tiedlora.attach
from torch.optim import optimizer
assert not optimizer._global_optimizer_pre_hooks and not optimizer._global_optimizer_post_hooks
import inspect
assert "nemo" not in sys.modules
assert inspect.signature(nemo_tiedlora.attach) == inspect.signature(nemo_tiedlora.attach.attach)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_method_of_ones_own_is_told_of_every_step():
    class Alternating(Tied):
        """Trains A in even steps, and B in odd ones."""

        changes_with_step = True
        step = 0

        def active_keys(self):
            return {"qkv.B" if self.step % 2 else "qkv.A"}

        def advance(self, ranks=None):
            self.step += 1

        def state_dict(self):
            return {"step": self.step}

    METHODS.add(Method("alternating", TiedConfig, Alternating, "A and B in turn", {"preset": "TL5"}))
    try:
        torch.manual_seed(0)
        model = Layers(3)
        adapter = attach(model, "alternating", ["qkv"], rank=2)
        optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2), weight_decay=0.1)
        contract = adapter.attach_to(optimizer)
        for number in range(4):
            before = {key: tensor.detach().clone() for key, tensor in adapter.named_tensors().items()}
            optimizer.zero_grad()
            (model(torch.randn(4, 6, dtype=torch.float64)) - 0.3).square().sum().backward()
            optimizer.step()
            changed = {key for key, tensor in adapter.named_tensors().items() if not torch.equal(tensor, before[key])}
            assert changed == {"qkv.B" if number % 2 else "qkv.A"}
        assert contract.state_dict()["variant"] == {"step": 4}
    finally:
        METHODS._known.pop("alternating")
