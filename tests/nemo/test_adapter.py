"""Tied-LoRA inside NeMo: real Megatron layers, real training, real ``.nemo`` files."""

import re
import sys
import zipfile
from pathlib import Path

import forked
import pytest
import torch
import toy

from nemo_tiedlora.errors import UsageError

CHUNK = 24


def logits(model):
    """(1, CHUNK, vocabulary) of fixed tokens."""
    tokens = torch.arange(5, 5 + CHUNK)[None]
    positions = torch.arange(CHUNK)[None]
    chunk = model.model.module if model.cfg.megatron_amp_O2 else model.model
    chunk.eval()
    with torch.no_grad():
        return chunk(tokens, positions, None)


def adapters(model):
    return {
        name: module.get_adapter_module("tied_lora_attention_qkv")
        for name, module in model.named_modules()
        if name.endswith("linear_qkv")
    }


@pytest.mark.parametrize("base", ["llama", "gpt"])
def test_a_new_tl6_adapter_gives_exactly_the_base_logits(finetuning, base):
    plain, _ = finetuning(base, peft_scheme="none")
    adapted, _ = finetuning(base, peft_scheme="tied_lora", tied_lora_tuning={"preset": "TL6", "rank": 4})
    assert torch.equal(logits(adapted), logits(plain))


def test_the_adapted_logits_are_those_of_the_merged_weight(finetuning):
    model, _ = finetuning(peft_scheme="tied_lora", tied_lora_tuning={"rank": 4, "alpha": 6})
    with torch.no_grad():
        for adapter in adapters(model).values():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter))
    adapted = logits(model)
    shared = next(iter(adapters(model).values()))
    for name, adapter in adapters(model).items():
        linear = model.get_submodule(name)
        delta = 6 / 4 * (adapter.v[:, None] * shared.B) @ (adapter.u[:, None] * shared.A)
        linear.weight.data += delta
        linear.set_enabled_adapters(enabled=False)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)


def test_disabling_the_adapter_gives_the_base_back(finetuning):
    model, _ = finetuning(peft_scheme="tied_lora", tied_lora_tuning={"preset": "TL1", "rank": 4})
    plain, _ = finetuning(peft_scheme="none")
    assert not torch.equal(logits(model), logits(plain))
    for name in adapters(model):
        model.get_submodule(name).set_enabled_adapters(enabled=False)
    assert torch.equal(logits(model), logits(plain))
    for name in adapters(model):
        model.get_submodule(name).set_enabled_adapters(enabled=True)
    assert not torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("preset", ["LoRA", "TL1", "TL2", "TL3", "TL4", "TL5", "TL6", "VeRA"])
def test_training_moves_the_trained_parts_only(finetuning, preset):
    model, trainer = finetuning(
        peft_scheme="tied_lora", tied_lora_tuning={"preset": preset, "rank": 4}, trainer={"max_steps": 24}
    )
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    losses = losses_of(model, trainer)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == model.adapter_keys
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name]) is (name not in trained), name
    assert sum(losses[-8:]) < sum(losses[:8])


def losses_of(model, trainer):
    from lightning.pytorch import Callback

    losses = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            losses.append(float(trainer.callback_metrics["reduced_train_loss"]))

    trainer.callbacks.append(Record())
    trainer.fit(model)
    return losses


def test_the_trained_parameters_are_the_counted_ones(finetuning):
    from nemo_tiedlora.variants import Site, TiedConfig, build, count

    model, _ = finetuning(peft_scheme="tied_lora", tied_lora_tuning={"rank": 4})
    sites = [Site("attention_qkv", layer, 32, 64) for layer in range(4)]
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in model.adapter_keys}
    assert sum(sizes.values()) == count(build(TiedConfig(rank=4), 4), sites).trainable


def test_layer_selection_adapts_the_named_layers_only(finetuning):
    model, _ = finetuning(peft_scheme="tied_lora", tied_lora_tuning={"rank": 4, "layer_selection": [2, 4]})
    layers = {name.split(".layers.")[1][0] for name in model.adapter_keys}
    assert layers == {"1", "3"}


@pytest.mark.parametrize("preset", ["TL6", "VeRA"])
def test_a_saved_adapter_gives_identical_logits_in_a_fresh_process(finetuning, files, tmp_path, preset):
    model, _ = finetuning(peft_scheme="tied_lora", tied_lora_tuning={"preset": preset, "rank": 4})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.adapter_keys:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.setup_complete = True  # from here on NeMo saves the adapter, not the model
    model.save_to(str(tmp_path / "adapter.nemo"))
    torch.save(logits(model), tmp_path / "expected.pt")
    code = """
import sys, torch
from nemo_tiedlora.job.generate import generator
base, adapter, expected, chunk = sys.argv[1:]
with generator(base, adapter) as loaded:
    tokens, positions = torch.arange(5, 5 + int(chunk))[None], torch.arange(int(chunk))[None]
    with torch.no_grad():
        same = torch.equal(loaded.model.model(tokens, positions, None), torch.load(expected))
    print(list(loaded.generate(["what is 1 plus 2?"], 3)))
sys.exit(0 if same else 1)
"""
    arguments = [files["llama"], tmp_path / "adapter.nemo", tmp_path / "expected.pt", CHUNK]
    (tmp_path / "code.py").write_text(code)
    exit_code, _, err = forked.script(tmp_path / "code.py", *arguments)
    assert exit_code == 0, err[-2000:]


def test_bf16_trains(finetuning):
    for o2 in (False, True):
        model, trainer = finetuning(
            peft_scheme="tied_lora",
            tied_lora_tuning={"rank": 4},
            trainer={"max_steps": 24, "precision": "bf16"},
            model={"megatron_amp_O2": o2},
        )
        losses = losses_of(model, trainer)
        assert sum(losses[-8:]) < sum(losses[:8])


def test_megatrons_distributed_optimizer_trains(finetuning):
    optim = toy.OPTIM | {"name": "mcore_distributed_optim"}
    model, trainer = finetuning(
        peft_scheme="tied_lora",
        tied_lora_tuning={"preset": "LoRA", "rank": 4},
        trainer={"max_steps": 24, "precision": "bf16"},
        model={"megatron_amp_O2": True, "optim": optim},
    )
    losses = losses_of(model, trainer)
    assert sum(losses[-8:]) < sum(losses[:8])


@pytest.mark.parametrize("optimizer", ["adamw", "mcore_distributed_optim"])
def test_factors_formed_once_per_step_follow_copies_that_an_optimizer_trains(finetuning, optimizer):
    """It writes its bfloat16 model's tensors behind autograd's back."""
    from lightning.pytorch import Callback

    class Compare(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            adapter = layer.adapter_layer["cond_lora_attention_qkv"]
            theta = model.adaptations["cond_lora"].bank.named_tensors()["attention_qkv.theta_B"].detach()
            seen.append(theta.clone())
            with torch.no_grad():
                torch.testing.assert_close(adapter.factors().B, layer.weight.detach() @ theta)

    seen = []
    model, trainer = finetuning(
        peft_scheme="cond_lora",
        cond_lora_tuning={"rank": 4},
        trainer={"max_steps": 3, "precision": "bf16"},
        model={"megatron_amp_O2": True, "optim": toy.OPTIM | {"name": optimizer}},
    )
    layer = model._unwrap_layers_model_list()[1].self_attention.linear_qkv
    trainer.callbacks.append(Compare())
    trainer.fit(model)
    assert len(seen) == 3 and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize(
    ("scheme", "settings", "field"), [("dyna_lora", {}, "model.optim.name"), ("tied_lora", {"lr_ratio": 2}, "lr_ratio")]
)
def test_what_the_distributed_optimizer_would_not_do_is_refused(finetuning, scheme, settings, field):
    optim = toy.OPTIM | {"name": "mcore_distributed_optim"}
    with pytest.raises(UsageError, match=f"^{field}="):
        finetuning(peft_scheme=scheme, model={"optim": optim}, **{f"{scheme}_tuning": settings})


def test_a_damaged_training_checkpoint_is_refused_by_name(finetuning, tmp_path):
    model, trainer = finetuning(peft_scheme="tied_lora", trainer={"max_steps": 2})
    trainer.fit(model)
    path = tmp_path / "run-last.ckpt"
    trainer.save_checkpoint(path)
    assert trainer.strategy.load_checkpoint(path)["adapters"]["tied_lora"]
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        contents = [whole.index(archive.read(member)) for member in archive.infolist() if member.file_size > 64]
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in contents]
    assert len(flipped) > 2
    for damaged in (*flipped, whole[: len(whole) // 2], b"not a checkpoint", b""):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="run-last.ckpt': damaged or cut off"):
            trainer.strategy.load_checkpoint(path)


def test_gradients_are_not_reduced_before_they_are_whole(finetuning):
    from nemo_tiedlora.nemo.peft_config import FactorPEFTConfig

    optim = toy.OPTIM | {"name": "mcore_distributed_optim", "overlap_grad_sync": True}
    model, _ = finetuning(peft_scheme="tied_lora", model={"optim": optim})
    config = model.cfg.copy()
    FactorPEFTConfig("tied_lora", config)
    config.pipeline_model_parallel_size = 2
    with pytest.raises(UsageError, match="^model.optim.overlap_grad_sync=True: would begin before"):
        FactorPEFTConfig("tied_lora", config)
    config.peft.tied_lora_tuning = {"layer_selection": [1, 2]}
    with pytest.raises(UsageError, match="^layer_selection=.*: a pipeline stage would train nothing"):
        FactorPEFTConfig("tied_lora", config)


def test_full_recomputation_gives_the_same_training(finetuning):
    ends = []
    for granularity in (None, "full"):
        recompute = {
            "activations_checkpoint_granularity": granularity,
            "activations_checkpoint_method": "uniform" if granularity else None,
            "activations_checkpoint_num_layers": 1 if granularity else None,
        }
        model, trainer = finetuning(
            peft_scheme="tied_lora", tied_lora_tuning={"rank": 4}, trainer={"max_steps": 6}, model=recompute
        )
        trainer.fit(model)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters() if name in model.adapter_keys})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def test_registering_twice_changes_nothing(host):
    from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP

    from nemo_tiedlora import register

    before = dict(PEFT_CONFIG_MAP), NLPAdapterModelMixin.__dict__["tie_weights"]
    register()
    assert (dict(PEFT_CONFIG_MAP), NLPAdapterModelMixin.__dict__["tie_weights"]) == before
    assert {"tied_lora", "vera", "lora", "none"} <= set(PEFT_CONFIG_MAP)


SCHEMES = {
    "tied_lora": {},
    "share_lora": {"groups": [[0, 1], [2, 3]], "train": ["A", "B", "u", "v"]},
    "cond_lora": {},
    "dyna_lora": {"inner": "tied_lora", "period": 4},
    "lora_xs": {"std_R": 0.01},
    "uni_lora": {"dimension": 2000},
}
EVERY_MATRIX = ["attention_q", "attention_k", "attention_v", "attention_dense", "mlp_gate", "mlp_up", "mlp_fc2"]


def numpy_rows(part, weight):
    """Rows of one matrix in the toy Llama's fused ones: 4 heads of 8 in 2 query groups; gate before up."""
    if part in ("attention_q", "attention_k", "attention_v"):
        groups = [weight[start : start + 32] for start in (0, 32)]  # per group: 2 queries, 1 key, 1 value, of 8 rows
        cut = {"attention_q": (0, 16), "attention_k": (16, 24), "attention_v": (24, 32)}[part]
        return torch.cat([group[cut[0] : cut[1]] for group in groups])
    return {"mlp_gate": weight[:64], "mlp_up": weight[64:]}.get(part, weight)


@pytest.mark.parametrize("targets", [["all"], EVERY_MATRIX], ids=["fused", "single"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_target_adds_the_merged_weight(finetuning, scheme, targets):
    """Each adapter's ΔW goes where its matrix is: checked by adding B A to those rows by hand."""
    from nemo_tiedlora.model.targets import TARGETS, expand

    torch.manual_seed(0)
    settings = {"rank": 4, "target_modules": targets, **SCHEMES[scheme]}
    model, _ = finetuning(peft_scheme=scheme, **{f"{scheme}_tuning": settings})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.adapter_keys:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted = logits(model)
    deltas = []
    for layer in model.model.decoder.layers:
        for target in expand(targets):
            linear = layer.get_submodule(TARGETS[target].path)
            adapter = linear.adapter_layer[f"{scheme}_{target}"]
            x = torch.eye(linear.weight.shape[1])
            with torch.no_grad():
                deltas.append((linear, target, adapter(torch.zeros(len(x), linear.weight.shape[0]), x).T))
    for linear, target, delta in deltas:
        inside = numpy_rows(target, delta)
        assert torch.count_nonzero(delta) == torch.count_nonzero(inside) > 0
        linear.weight.data += delta
        linear.set_enabled_adapters(enabled=False)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_trains_on_every_target(finetuning, scheme):
    settings = {"rank": 4, "target_modules": EVERY_MATRIX, **SCHEMES[scheme]}
    model, trainer = finetuning(
        peft_scheme=scheme, trainer={"max_steps": 24}, model={"micro_batch_size": 2}, **{f"{scheme}_tuning": settings}
    )
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    losses = losses_of(model, trainer)
    assert sum(losses[-8:]) < sum(losses[:8])
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]) is (name not in model.adapter_keys), name


@pytest.mark.parametrize("o2", [False, True])
def test_inactive_modules_stay_as_they_are(finetuning, o2):
    """Also where gradients are kept in buffers that give every tensor one."""
    settings = {"inner": "lora", "rank": 4, "active": 2, "schedule": "once", "period": 100}
    model, trainer = finetuning(
        peft_scheme="dyna_lora",
        dyna_lora_tuning=settings,
        trainer={"max_steps": 6, "precision": "bf16" if o2 else 32},
        model={"megatron_amp_O2": o2},
    )
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if name in model.adapter_keys}
    trainer.fit(model)
    moved = {
        name.split(".layers.")[1][0]
        for name, tensor in model.named_parameters()
        if name in before and not torch.equal(tensor, before[name])
    }
    dynamic = model.adaptations["dyna_lora"].bank.variant
    assert moved == {str(site.layer) for site in dynamic.active}
    assert dynamic.step == 6 and all(score > 0 for score in dynamic.importance)


@pytest.mark.parametrize("inner", ["lora", "cond_lora"])
def test_dora_and_two_learning_rates_train_in_nemo(finetuning, inner):
    settings = {"inner": inner, "rank": 4, "dora": True, "lr_ratio": 4, "target_modules": ["attention_v", "mlp_fc2"]}
    model, trainer = finetuning(peft_scheme="dyna_lora", dyna_lora_tuning=settings, trainer={"max_steps": 24})
    losses = losses_of(model, trainer)
    assert sum(losses[-8:]) < sum(losses[:8])
    ratios = {group["lr_ratio"] for group in trainer.optimizers[0].param_groups}
    assert ratios == {1, 4}


def test_two_adapters_work_side_by_side(finetuning, tmp_path):
    """NeMo's LoRA, a tied and a shared adapter on one layer: trained together, switched on and off one by one, saved
    in one file, and loaded from it."""
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP

    names = ("lora", "tied_lora", "share_lora")
    sections = dict(lora_tuning=toy.LORA, tied_lora_tuning={"rank": 4}, share_lora_tuning={"rank": 2})
    plain, _ = finetuning(peft_scheme="none")
    model, trainer = finetuning(peft_scheme=",".join(names), trainer={"max_steps": 6}, **sections)
    trainer.fit(model)
    linear = model.model.decoder.layers[1].self_attention.linear_qkv
    together = logits(model)
    parts = list(linear.adapter_layer)
    assert parts == ["tied_lora_attention_qkv", "share_lora_attention_qkv"]
    for part in parts:
        for layer in model.model.decoder.layers:
            layer.self_attention.linear_qkv.set_enabled_adapters(part, enabled=False)
        assert not torch.equal(logits(model), together)
    assert not linear.is_adapter_available() or not linear.get_enabled_adapters()
    for layer in model.model.decoder.layers:
        layer.self_attention.set_enabled_adapters(enabled=False)
    assert torch.equal(logits(model), logits(plain))
    for layer in model.model.decoder.layers:
        layer.self_attention.set_enabled_adapters(enabled=True)
        layer.self_attention.linear_qkv.set_enabled_adapters(enabled=True)
    assert torch.equal(logits(model), together)

    assert set(model.get_peft_state_dict()) == model.adapter_keys
    model.save_to(str(tmp_path / "both.nemo"))
    fresh, _ = finetuning(peft_scheme="none")
    configs = [PEFT_CONFIG_MAP[name](model.cfg) for name in names]
    fresh.load_adapters(str(tmp_path / "both.nemo"), configs)
    assert torch.equal(logits(fresh), together)


def test_every_scheme_has_an_adapter_class_and_config_of_its_own(host):
    from nemo.core.classes.mixins.adapter_mixins import get_registered_adapter
    from nemo.utils.model_utils import import_class_by_path

    from nemo_tiedlora import register
    from nemo_tiedlora.nemo import adapter
    from nemo_tiedlora.nemo.mixins import LOCAL

    register()
    names = ["TiedLora", "Vera", "ShareLora", "CondLora", "DynaLora"]
    for name, scheme in zip(names, ["tied_lora", "vera", "share_lora", "cond_lora", "dyna_lora"], strict=True):
        name, config = f"{name}Adapter", adapter.adapter_config(scheme)
        assert config.__name__ == f"{name}Config"
        assert import_class_by_path(config._target_) is getattr(adapter, name)
    for adapted in LOCAL.values():
        assert get_registered_adapter(adapted.__bases__[0]).adapter_class is adapted


def test_the_method_of_the_documentation_works_everywhere(finetuning):
    """docs/adding-a-method.md: one class and one line; then NeMo trains it, and DynaLoRA and DoRA go over it."""
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
    from omegaconf import OmegaConf
    from stack import Layers, follows

    from nemo_tiedlora import attach, register
    from nemo_tiedlora.model.sizes import sizes
    from nemo_tiedlora.variants import METHODS, config_for

    page = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope = {"__name__": "page"}
    sys.modules["page"] = type(sys)("page")  # dataclasses look their module up
    try:
        exec("\n".join(blocks), scope)
        register()
        config = config_for("core_lora", {"rank": 2, "alpha": 3.0, "std_R": 0.5})
        torch.manual_seed(0)
        model = Layers()
        adapter = attach(model, config, ["qkv"])
        named = adapter.named_tensors()

        def reference(x):
            for number, layer in enumerate(model.layers):
                base, R = layer["qkv"], named[f"qkv.{number}.R"]
                h = x @ named["qkv.A"].T @ R.T @ named["qkv.B"].T
                x = torch.tanh((x @ base.weight.T + base.bias + 1.5 * h)[..., :6])
            return x

        assert follows(adapter, reference) == {f"qkv.{number}.R" for number in range(3)}
        llama = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32}
        assert sizes(config_for("core_lora", {}), OmegaConf.create(llama)).trainable == 2048
        for scheme, settings in (("core_lora", {"dora": True}), ("dyna_lora", {"inner": "core_lora"})):
            tuning = {f"{scheme}_tuning": {"rank": 4} | settings}
            model, trainer = finetuning(peft_scheme=scheme, trainer={"max_steps": 24}, **tuning)
            losses = losses_of(model, trainer)
            assert sum(losses[-8:]) < sum(losses[:8])
    finally:
        METHODS._known.pop("core_lora", None)
        PEFT_CONFIG_MAP.pop("core_lora", None)
        del sys.modules["page"]


def test_conditional_factors_on_a_single_matrix_use_its_rows_of_the_weight(finetuning):
    settings = {"rank": 4, "target_modules": ["attention_v"]}
    model, _ = finetuning(peft_scheme="cond_lora", cond_lora_tuning=settings)
    first = model.model.decoder.layers[0].self_attention.linear_qkv
    adapter = first.adapter_layer["cond_lora_attention_v"]
    with torch.no_grad():
        adapter.theta_B.normal_()
    W = numpy_rows("attention_v", first.weight.detach())
    expected = (W @ adapter.theta_B) @ (adapter.theta_A.T @ W)
    x = torch.eye(32)
    with torch.no_grad():
        delta = adapter(torch.zeros(32, 64), x).T
    torch.testing.assert_close(numpy_rows("attention_v", delta), expected, rtol=1e-4, atol=1e-4)
