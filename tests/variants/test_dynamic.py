"""DynaLoRA: who is active, what inactive modules do not do, and that runs can be continued."""

import json
from collections import Counter
from random import Random

import numpy
import pytest
import torch
from stack import Layers

from nemo_tiedlora import attach
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import config_for
from nemo_tiedlora.variants.allocate import ALLOCATORS, Modules

INNER = {
    "lora": {},
    "vera": {},
    "tied_lora": {"preset": "TL6"},
    "share_lora": {"groups": [[0, 1]]},
    "cond_lora": {},
}


def dynamic(lr=1e-2, **settings):
    """A model with DynaLoRA, its bank, an optimizer and the contract between them."""
    torch.manual_seed(0)
    model = Layers(6)
    adapter = attach(model, "dyna_lora", ["qkv"], **{"rank": 2, **settings})
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr), weight_decay=0.0, eps=1e-30)
    return model, adapter.bank, optimizer, adapter.attach_to(optimizer)


def step(model, optimizer, seed=0, batches=1):
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    for _ in range(batches):
        x = torch.randn(4, 6, dtype=torch.float64, generator=generator)
        (model(x) - 0.3).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("inner", INNER)
def test_all_modules_contribute_but_only_active_ones_get_gradients(inner):
    settings = {"inner": inner, "settings": INNER[inner], "active": 2}
    model, bank, _, _ = dynamic(**settings)
    with torch.no_grad():
        for tensor in bank.named_tensors().values():
            tensor += torch.randn_like(tensor)
    plain = Layers(6)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".adapter." not in key})
    x = torch.randn(4, 6, dtype=torch.float64)
    y = model(x)
    for number, layer in enumerate(plain.layers):
        A, B, s, *_ = model.layers[number]["qkv"].adapter.factors().folded()
        layer["qkv"].weight.data += s * B @ A
    torch.testing.assert_close(y, plain(x), rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    got = {key for key, tensor in bank.named_tensors().items() if tensor.requires_grad and tensor.grad is not None}
    trained = {key for key, tensor in bank.named_tensors().items() if tensor.requires_grad}
    assert got == bank.variant.active_keys() & trained
    assert len(bank.variant.active) == 2


def test_gradients_of_a_tied_tensor_come_from_the_active_modules_only():
    """The reference detaches the inactive layers' factors by hand."""
    model, bank, _, _ = dynamic(inner="tied_lora", settings={"preset": "TL5"}, active=2)
    named = bank.named_tensors()
    with torch.no_grad():
        named["qkv.B"].normal_()
    x = torch.randn(4, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    ours = {key: tensor.grad.clone() for key, tensor in named.items()}
    model.zero_grad()
    active = {site.layer for site in bank.variant.active}
    for number, layer in enumerate(model.layers):
        base = layer["qkv"]
        A, B = (named[f"qkv.{part}"] if number in active else named[f"qkv.{part}"].detach() for part in "AB")
        x = torch.tanh((x @ base.weight.T + base.bias + (x @ A.T) @ B.T)[..., :6])
    x.square().sum().backward()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, named[key].grad, rtol=1e-10, atol=1e-10)


def test_inactive_modules_keep_no_activations_and_compute_no_weight_gradients():
    from torch.utils._python_dispatch import TorchDispatchMode

    torch.manual_seed(0)
    tokens, width, rank = 512, 6, 2
    kept, products = {}, {}
    for active in (1, 6):
        model, _, _, _ = dynamic(active=active)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            y = model(torch.randn(tokens, width, dtype=torch.float64))

        class Record(TorchDispatchMode):
            shapes = Counter()

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                if "mm" in str(function):
                    self.shapes[tuple(result.shape)] += 1
                return result

        with Record() as record:
            y.square().sum().backward()
        kept[active] = saved.count(tokens * rank)
        products[active] = record.shapes[rank, width], record.shapes[10, rank]
        record.shapes.clear()
    assert kept == {1: 1, 6: 6}
    assert products == {1: (1, 1), 6: (6, 6)}


def test_inactive_modules_and_their_optimizer_state_stay_bit_identical():
    model, bank, optimizer, _ = dynamic(active=3, period=2, allocator="random")
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5
    for number in range(8):
        before = {key: tensor.detach().clone() for key, tensor in bank.named_tensors().items()}
        states = {key: str(optimizer.state[tensor]) for key, tensor in bank.named_tensors().items()}
        active = bank.variant.active_keys()
        step(model, optimizer, number)
        for key, tensor in bank.named_tensors().items():
            unchanged = torch.equal(tensor, before[key]) and str(optimizer.state[tensor]) == states[key]
            assert unchanged is (key not in active), (number, key)


def test_zero_gradients_of_inactive_modules_change_nothing():
    """Gradient buffers of distributed optimizers give every tensor a gradient."""
    model, bank, optimizer, _ = dynamic(active=2, period=100)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5
    step(model, optimizer)
    for tensor in bank.named_tensors().values():
        tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    before = {key: tensor.detach().clone() for key, tensor in bank.named_tensors().items()}
    optimizer.step()
    for key, tensor in bank.named_tensors().items():
        assert torch.equal(tensor, before[key]) is (key not in bank.variant.active_keys())
        assert tensor.grad is not None


@pytest.mark.parametrize("norm", [1, 2])
def test_forward_importance_is_the_running_sum_of_output_norms(norm):
    model, bank, optimizer, _ = dynamic(norm=norm, period=100)
    expected = numpy.zeros(6)
    for number in range(3):
        outputs = []
        hooks = [
            layer["qkv"].register_forward_hook(lambda _, __, y, outputs=outputs: outputs.append(y.detach().clone()))
            for layer in model.layers
        ]
        step(model, optimizer, number, batches=2)
        for hook in hooks:
            hook.remove()
        for index, y in enumerate(outputs):
            expected[index % 6] += numpy.linalg.norm(y.numpy(), norm, axis=1).sum()
    numpy.testing.assert_allclose(bank.variant.importance, expected, rtol=1e-5)


@pytest.mark.parametrize("norm", [1, 2])
def test_backward_importance_is_the_running_sum_of_gradient_norms(norm):
    model, bank, optimizer, _ = dynamic(importance="backward", active=2, norm=norm, period=100, scoring_steps=2)
    expected, last = numpy.full(6, 1e-6), numpy.zeros(6)
    for number in range(5):
        assert len(bank.variant.active) == (6 if number < 2 else 2)
        step(model, optimizer, number)
        for index in range(6):
            grads = [bank.named_tensors()[f"qkv.{index}.{part}"].grad for part in "AB"]
            if grads[0] is not None:
                flat = numpy.concatenate([grad.numpy().ravel() for grad in grads])
                last[index] = numpy.linalg.norm(flat, norm)
        expected += last  # an inactive module's: that of its last active step
    numpy.testing.assert_allclose(bank.variant.importance, expected, rtol=1e-5)


@pytest.mark.parametrize("allocator", ["stochastic", "discounted_stochastic"])
def test_under_backward_importance_every_module_has_its_turn(allocator):
    model, bank, optimizer, _ = dynamic(importance="backward", allocator=allocator, active=2, period=1)
    step(model, optimizer)
    turns = set()
    for number in range(1, 40):
        turns |= bank.variant.active
        step(model, optimizer, number)
    assert turns == set(bank.variant.modules)


@pytest.mark.parametrize("settings", [{"allocator": "topk", "active": 2}, {"allocator": "threshold", "threshold": 0.3}])
def test_under_backward_importance_the_choice_of_the_most_important_can_change(settings):
    model, bank, optimizer, _ = dynamic(lr=3e-2, importance="backward", period=1, **settings)
    choices = set()
    for _ in range(80):
        step(model, optimizer)
        choices.add(bank.variant.active)
    assert len(choices) > 1


def test_validation_does_not_count():
    model, bank, optimizer, _ = dynamic(period=100)
    model.eval()
    model(torch.randn(4, 6, dtype=torch.float64))
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 6, dtype=torch.float64))
    assert not bank.variant._seen


SCORES = Modules(importance=[5.0, 1.0, 3.0, 0.5, 0.5], counts=[1, 1, 1, 1, 1])


def test_topk_takes_the_most_important():
    assert ALLOCATORS["topk"](SCORES, 2, Random(0)) == [0, 2]


@pytest.mark.parametrize(
    ("p", "modules"), [(0.5, [0]), (0.51, [0, 2]), (0.8, [0, 2]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2, 3, 4])]
)
def test_threshold_takes_the_fewest_that_reach_it(p, modules):
    assert ALLOCATORS["threshold"](SCORES, p, Random(0)) == modules


def test_stochastic_draws_in_proportion_and_without_replacement():
    random, draws = Random(0), 20_000
    first = Counter(ALLOCATORS["stochastic"](SCORES, 1, random)[0] for _ in range(draws))
    for module, share in enumerate((0.5, 0.1, 0.3, 0.05, 0.05)):
        assert first[module] / draws == pytest.approx(share, abs=0.015)
    pairs = [ALLOCATORS["stochastic"](SCORES, 2, random) for _ in range(draws)]
    assert all(len(set(pair)) == 2 for pair in pairs)
    share = 0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7  # 0 then 2, or 2 then 0
    assert pairs.count([0, 2]) / draws == pytest.approx(share, abs=0.015)


def test_discounted_stochastic_divides_by_the_steps_active():
    random, draws = Random(0), 20_000
    modules = Modules(SCORES.importance, [10, 1, 3, 1, 1])  # 0.05, 0.1, 0.1, 0.05, 0.05
    first = Counter(ALLOCATORS["discounted_stochastic"](modules, 1, random)[0] for _ in range(draws))
    for module, share in enumerate((1 / 7, 2 / 7, 2 / 7, 1 / 7, 1 / 7)):
        assert first[module] / draws == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("allocator", ["stochastic", "discounted_stochastic", "random"])
def test_modules_without_a_score_can_fill_up_the_number(allocator):
    assert ALLOCATORS[allocator](Modules([0.0, 2.0, 0.0], [1, 1, 1]), 3, Random(0)) == [0, 1, 2]


def test_periodic_and_once_choose_when_they_say():
    for schedule, expected in (("periodic", [0, 2, 4, 6]), ("once", [0, 2])):
        model, bank, optimizer, _ = dynamic(schedule=schedule, period=2)
        for number in range(7):
            step(model, optimizer, number)
        assert [allocation.step for allocation in bank.variant.log] == expected


def test_two_thirds_are_active_by_default_and_the_steps_are_counted():
    model, bank, optimizer, _ = dynamic(period=3)
    for number in range(6):
        assert len(bank.variant.active) == 4
        step(model, optimizer, number)
    assert sum(bank.variant.active_steps) == 6 * 4


@pytest.mark.parametrize("mode", ["global", "local"])
def test_learning_rates_follow_the_run_or_each_tensors_own_steps(mode):
    """Sign descent moves by the learning rate: in local mode, a tensor's n-th active step by the schedule's n-th."""
    schedule = [2.0**-number for number in range(8)]
    model, bank, optimizer, _ = dynamic(active=2, period=1, allocator="random", optimizer=mode, lr=1.0)
    taken = Counter()
    for number, rate in enumerate(schedule):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.state.clear()
        before = {key: tensor.detach().clone() for key, tensor in bank.named_tensors().items()}
        active = bank.variant.active_keys()
        step(model, optimizer, number)
        for key in active:
            moved = (bank.named_tensors()[key] - before[key]).abs().max().item()
            if moved:  # A gets no gradient while its B is 0
                assert moved == pytest.approx(rate if mode == "global" else schedule[taken[key]], rel=1e-4), key
            taken[key] += 1
    assert max(taken.values()) < len(schedule)


def test_a_resumed_run_ends_as_an_undisturbed_one():
    settings = dict(period=2, active=3)
    whole, bank, optimizer, _ = dynamic(**settings)
    for number in range(8):
        step(whole, optimizer, number)
    first, first_bank, first_optimizer, contract = dynamic(**settings)
    for number in range(3):
        step(first, first_optimizer, number)
    saved = json.loads(json.dumps(contract.state_dict()))
    second, second_bank, second_optimizer, contract = dynamic(**settings)
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    contract.load_state_dict(saved)
    for number in range(3, 8):
        step(second, second_optimizer, number)
    for key, tensor in bank.named_tensors().items():
        assert torch.equal(tensor, second_bank.named_tensors()[key])
    assert bank.variant.log == second_bank.variant.log


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner": "dyna_lora"}, "inner='dyna_lora': its modules take turns already"),
        ({"inner": "tide_lora"}, "did you mean 'tied_lora'"),
        ({"allocator": "top"}, "did you mean 'topk'"),
        ({"settings": {"preset": "TL5"}, "inner": "cond_lora"}, "settings.preset"),
        ({"settings": {"presett": "TL5"}, "inner": "tied_lora"}, "did you mean 'preset'"),
        ({"active": 0}, "active=0"),
        ({"active": 3, "allocator": "threshold"}, "set threshold"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"period": 0}, "period=0"),
        ({"norm": 3}, "norm=3"),
        ({"scoring_steps": 0, "importance": "backward"}, "scoring_steps=0: must be 1 to the period, 50"),
        ({"scoring_steps": 51, "importance": "backward"}, "scoring_steps=51: must be 1 to the period, 50"),
        ({"scoring_steps": 2}, "scoring_steps=2: goes with importance: backward"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        config_for("dyna_lora", settings)


def test_more_active_modules_than_there_are_is_refused():
    with pytest.raises(UsageError, match="active=7: there are 6 modules"):
        dynamic(active=7)
