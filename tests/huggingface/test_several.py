"""Several adapters on one model: each is what it would be alone, and a mix is the sum of what each does to W."""

import pytest
import torch
import twins
from by_hand import contents, encoder, fused, separate
from torch.func import functional_call

from nemo_tiedlora import huggingface
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import FrozenWeight

NAMES = [[f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv"] for layer in range(3)]
HOW = {
    "tied": {"scheme": "tied_lora", "targets": ["attention_qkv"], "preset": "TL6", "rank": 4, "alpha": 6.0},
    "cond": {"scheme": "cond_lora", "targets": ["attention_qkv"], "rank": 2, "seed": 3},
    "dora": {"scheme": "tied_lora", "targets": ["q_proj"], "preset": "LoRA", "dora": True, "rank": 3, "seed": 5},
}


def shaken(adapter, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.named_tensors().values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
    return adapter


def several(bases, names=tuple(HOW)):
    model = twins.transformers_model(bases("llama")[0]).double()
    return model, [shaken(huggingface.attach(model, name=name, **HOW[name]), len(name)) for name in names]


def changes(model, adapters):
    """What each adapter does to each weight, alone: its equation on the joined W."""
    found = {}
    for adapter in adapters:
        named = {key: tensor.detach() for key, tensor in adapter.named_tensors().items()}
        for layer, names in enumerate(NAMES):
            weights = [model.get_parameter(name).detach() for name in names]
            W = fused(*weights, 2, 8)
            if adapter.name == "tied":
                A = named[f"attention_qkv.{layer}.u"][:, None] * named["attention_qkv.A"]
                B = named[f"attention_qkv.{layer}.v"][:, None] * named["attention_qkv.B"]
                parts = separate(1.5 * B @ A, 2, 8, 6)
            elif adapter.name == "cond":
                parts = separate((W @ named["attention_qkv.theta_B"]) @ (named["attention_qkv.theta_A"].T @ W), 2, 8, 6)
            else:
                q = weights[0]
                V = q + named[f"attention_q.{layer}.B"] @ named[f"attention_q.{layer}.A"]
                parts = [named[f"attention_q.{layer}.m"][:, None] * V / V.norm(dim=1, keepdim=True) - q]
            for name, part in zip(names, parts, strict=False):
                found[adapter.name, name] = part
    return found


def expected(model, adapter, found, weights):
    """The logits with each adapter's changes so many times in W."""
    mixed = {}
    for (name, where), change in found.items():
        W = mixed.get(where, model.get_parameter(where).detach())
        mixed[where] = W + weights.get(name, 0) * change
    with adapter.adapters.disabled():
        return functional_call(model, mixed, (twins.IDS,)).logits


MIXES = [{"tied": 1}, {"dora": 1}, {"dora": 0.5}, {"tied": 0.7, "cond": -0.3}, {"cond": 0.5, "dora": 0.25, "tied": 2}]


@torch.no_grad()
def test_what_is_active_follows_the_equation_and_so_does_what_is_merged(bases):
    model, adapters = several(bases)
    found, plain, all_of_them = changes(model, adapters), {}, adapters[0].adapters
    with all_of_them.disabled():
        plain = model(twins.IDS).logits
    assert list(all_of_them) == list(HOW) and all_of_them.active == {"dora": 1.0}  # the last one
    for mix in MIXES:
        all_of_them.set_adapter(mix)
        logits = model(twins.IDS).logits
        assert (logits - plain).abs().max() > 1e-2
        torch.testing.assert_close(logits, expected(model, adapters[0], found, mix), rtol=1e-9, atol=1e-9)
        with all_of_them.disabled():
            with all_of_them["tied"].disabled(), all_of_them.disabled():
                pass
            assert torch.equal(model(twins.IDS).logits, plain)
        left = dict(list(mix.items())[1:])
        with all_of_them[next(iter(mix))].disabled():
            torch.testing.assert_close(model(twins.IDS).logits, expected(model, adapters[0], found, left))
        torch.testing.assert_close(model(twins.IDS).logits, logits)
    for mix in MIXES:
        model, adapters = several(bases)
        logits = expected(model, adapters[0], found, mix)
        adapters[0].adapters.merge(mix)
        torch.testing.assert_close(model(twins.IDS).logits, logits, rtol=1e-9, atol=1e-9)
        assert all(parameter.requires_grad for parameter in model.parameters()) and len(list(model.parameters())) == 30


@torch.no_grad()
def test_a_mix_can_be_taken_out_again_where_nothing_in_it_reads_the_weights(bases):
    model, adapters = several(bases)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapters[0].merge()
    assert "adapter" not in "".join(model.state_dict())
    for adapter in adapters:
        with pytest.raises(UsageError, match="is off the model already"):
            adapter.merge()
        with pytest.raises(UsageError, match="is merged; save it before, or unmerge.. first"):
            adapter.adapter()
    later = huggingface.attach(model, name="later", **HOW["cond"])
    with pytest.raises(UsageError, match="adapter='later': was attached after merging"):
        adapters[0].unmerge()
    later.detach()
    adapters[1].unmerge()
    assert adapters[0].adapters.active == {"tied": 1.0}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, weights.get(name, parameter), rtol=1e-12, atol=1e-12)
    adapters[0].adapters.merge({"tied": 1, "dora": 1})
    with pytest.raises(UsageError, match="cannot be taken out: DoRA scaled the rows"):
        adapters[0].unmerge()


def test_training_one_changes_no_other_and_each_is_saved_as_if_it_were_alone(bases, tmp_path):
    alone = {}
    for name in HOW:
        model, (adapter,) = several(bases, [name])
        adapter.save(tmp_path / name)
        alone[name] = contents(tmp_path / name)
    model, adapters = several(bases)
    for adapter in adapters:
        adapter.save(tmp_path / "beside")
        assert contents(tmp_path / "beside") == alone[adapter.name]
    assert len([name for name in model.state_dict() if "adapter" in name]) == sum(
        len(a.named_tensors()) for a in adapters
    )
    adapters[0].adapters.set_adapter("cond")
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    assert wanted == {id(tensor) for tensor in adapters[1].named_tensors().values()}
    optimizer = torch.optim.AdamW([group for a in adapters for group in a.parameter_groups(1e-2)], weight_decay=0.1)
    contracts = [adapter.attach_to(optimizer) for adapter in adapters]
    for name in ("dora", "cond"):
        adapters[0].adapters.set_adapter(name)
        model(twins.IDS, labels=twins.IDS).loss.backward()
    optimizer.step()
    for adapter in adapters:
        adapter.save(tmp_path / "after")
        assert (contents(tmp_path / "after") == alone[adapter.name]) == (adapter.name != "cond")
    assert [contract.paused for contract in contracts] == [True, False, True]
    before = model(twins.IDS).logits
    adapters[0].detach()
    adapters[2].detach()
    assert torch.equal(model(twins.IDS).logits, before)
    again = huggingface.load(model, tmp_path / "dora", name="again")
    assert again.adapters is adapters[1].adapters and again.adapters.active == {"again": 1.0}
    again.save(tmp_path / "again")
    assert contents(tmp_path / "again") == alone["dora"]
    again.detach()
    adapters[1].detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_switched_off_method_with_turns_takes_none(bases):
    model = twins.transformers_model(bases("llama")[0])
    turns = huggingface.attach(model, "dyna_lora", ["q_proj"], name="turns", rank=2, active=1, period=1, lr_ratio=2.0)
    plain = huggingface.attach(model, "tied_lora", ["q_proj"], name="plain", rank=2, lr_ratio=4.0)
    optimizer = torch.optim.SGD(plain.parameter_groups(1.0) + turns.parameter_groups(0.5))
    for adapter in (plain, turns):
        adapter.attach_to(optimizer)
    before = turns.variant.state_dict()
    for name, steps in (("plain", 0), ("turns", 1), ("plain", 1)):
        plain.adapters.set_adapter(name)
        model(twins.IDS, labels=twins.IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert turns.variant.step == steps
    assert turns.variant.state_dict() != before
    turns.adapters.set_adapter("turns")
    plain.detach()
    with pytest.raises(UsageError, match="dyna_lora takes part in every step"):
        turns.detach()
        turns = huggingface.attach(model, "dyna_lora", ["q_proj"], name="turns", rank=2, active=1, period=1)
        huggingface.attach(model, "tied_lora", ["q_proj"], name="plain", rank=2)
        turns.adapters.set_adapter("turns")  # the check outlives being switched off
        model(twins.IDS, labels=twins.IDS).loss.backward()


def test_every_adapter_has_heads_of_its_own(tmp_path):
    model, ids = encoder("bert"), torch.arange(24).view(2, 12) + 3
    original = model.classifier.weight
    start, plain = original.detach().clone(), model(ids).logits
    outputs = {}
    for name in ("one", "two"):
        adapter = huggingface.attach(model, "tied_lora", ["query"], name=name, rank=2, seed=len(outputs))
        assert torch.equal(model.classifier.weight, start) and model.classifier.weight.requires_grad
        optimizer = torch.optim.AdamW(adapter.parameter_groups(0.1))
        for _ in range(2):
            model(ids, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs[name] = model(ids).logits
        assert set(model.state_dict()) > {"classifier.weight", "classifier.bias"}
    adapters = adapter.adapters
    bare = huggingface.attach(model, "tied_lora", ["key"], name="bare", rank=2, modules_to_save=[])
    assert torch.equal(model.classifier.weight, start) and not model.classifier.weight.requires_grad
    bare.save(tmp_path / "bare")
    for name in ("two", "one"):
        adapters.set_adapter(name)
        assert torch.equal(model(ids).logits, outputs[name])
        adapters[name].save(tmp_path / name)
        adapters.set_adapter({name: 1, "bare": 1})
        torch.testing.assert_close(model(ids).logits, outputs[name])  # bare's B is 0
    with pytest.raises(UsageError, match="adapter='two': trains classifier whole, as one does, and a mix has one"):
        adapters.set_adapter({"one": 0.5, "two": 0.5})
    with adapters.disabled():
        assert model.classifier.weight is original and torch.equal(model(ids).logits, plain)
        adapters["one"].detach()
    assert model.classifier.weight is original
    two = adapters["two"]
    two.merge()
    torch.testing.assert_close(model(ids).logits, outputs["two"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    two.unmerge()
    torch.testing.assert_close(model(ids).logits, outputs["two"])
    for name in ("two", "bare"):
        adapters[name].detach()
    assert model.classifier.weight is original
    torch.testing.assert_close(model(ids).logits, plain)
    model = encoder("bert")
    for name in ("bare", "one", "two"):
        huggingface.load(model, tmp_path / name, name=name)
    assert torch.equal(model(ids).logits, outputs["two"])


def test_modules_by_name_are_trained_whole_and_come_back(bases, tmp_path):
    model = twins.transformers_model(bases("llama")[0])
    wanted = ["lm_head", "embed_tokens", "layers.1.input_layernorm"]
    adapter = huggingface.attach(model, "tied_lora", ["q_proj"], rank=2, modules_to_save=wanted)
    assert adapter.heads.names == ["lm_head", "model.embed_tokens", "model.layers.1.input_layernorm"]
    assert "model.embed_tokens, model.layers.1.input_layernorm: trained whole" in str(adapter)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(twins.IDS, labels=twins.IDS).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    heads = {f"{name}.weight" for name in adapter.heads.names}
    assert {name for name in moved if "adapter" not in name} == heads
    adapter.save(tmp_path / "adapter")
    after = model(twins.IDS).logits
    model = twins.transformers_model(bases("llama")[0])
    loaded = huggingface.load(model, tmp_path / "adapter")
    assert loaded.heads.names == adapter.heads.names and torch.equal(model(twins.IDS).logits, after)
    loaded.merge().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(twins.logits(tmp_path / "merged"), after)
    with pytest.raises(UsageError, match="is of lm_head, which a BertForSequenceClassification has not"):
        huggingface.heads.check(
            encoder("bert"), *huggingface.heads.read(model, tmp_path / "adapter"), tmp_path / "adapter"
        )


def test_the_statistics_of_a_head_are_kept_with_it(tmp_path):
    def model():
        made = encoder("bert")
        made.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(24), torch.nn.Linear(24, 2)).double()
        return made

    trained, ids = model(), torch.arange(24).view(2, 12) + 3
    adapter = huggingface.attach(trained, "tied_lora", ["query"], rank=2)
    with torch.no_grad():
        trained.train()(ids)
    adapter.save(tmp_path / "adapter")
    loaded = model()
    huggingface.load(loaded, tmp_path / "adapter")
    assert loaded.classifier[0].num_batches_tracked == 1
    assert torch.equal(loaded.eval()(ids).logits, trained.eval()(ids).logits)
    adapter.detach()
    assert trained.classifier[0].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modules_to_save": ["lm_haed"]},
            "modules_to_save='lm_haed': no module has this name; did you mean 'lm_head'",
        ),
        ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head': write a list of names"),
        ({"modules_to_save": ["layers.1.self_attn.q_proj"]}, "targets='q_proj': names 2 of 3 layers"),
        ({"modules_to_save": ["act_fn"]}, "modules_to_save='model.layers.0.mlp.act_fn': has no tensors"),
        ({"name": "a.b"}, "name='a.b': write letters, digits and underscores"),
        ({"name": "first"}, "name='first': the model has an adapter of this name already"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_and_changes_nothing(settings, message, bases):
    model = twins.transformers_model(bases("llama")[0])
    huggingface.attach(model, "tied_lora", ["v_proj"], name="first", rank=2)
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(UsageError, match=message):
        huggingface.attach(model, "tied_lora", ["q_proj"], **{"name": "second", "rank": 2} | settings)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before


def test_mixes_that_cannot_be_are_said_in_one_line(bases):
    model, adapters = several(bases, ["tied", "cond"])
    both = adapters[0].adapters
    for mix, message in (
        ({"tide": 1}, "adapter='tide': is not on the model; did you mean 'tied'. Valid: tied, cond"),
        ({"tied": float("nan")}, "its weight must be a finite number"),
        ({"tied": "much"}, "its weight must be a finite number"),
        ({}, "name one at least; disabled.. is the model without any"),
    ):
        for do in (both.set_adapter, both.merge):
            with pytest.raises(UsageError, match=message):
                do(mix)
    assert both.active == {"cond": 1.0}
    with pytest.raises(UsageError, match="an adapter is on a LlamaForCausalLM that has modules of it"):
        huggingface.attach(model.model, "tied_lora", ["q_proj"], name="inside", rank=2)
    with pytest.raises(UsageError, match="has adapted layers in it, which stay frozen"):
        huggingface.attach(model, "tied_lora", ["down_proj"], name="b", rank=2, modules_to_save=["self_attn"])
    huggingface.attach(model, "tied_lora", ["down_proj"], name="whole", rank=2, modules_to_save=["up_proj"])
    with pytest.raises(UsageError, match="targets='model.layers.0.mlp.up_proj': the adapter whole trains it whole"):
        huggingface.attach(model, "tied_lora", ["mlp.*_proj"], name="b", rank=2)
    tied = twins.transformers_model(bases("qwen3")[0])
    with pytest.raises(UsageError, match="lm_head.weight is model.embed_tokens.weight too; name model.embed_tokens"):
        huggingface.attach(tied, "tied_lora", ["q_proj"], rank=2, modules_to_save=["lm_head"])
    pair = huggingface.attach(tied, "tied_lora", ["q_proj"], rank=2, modules_to_save=["lm_head", "embed_tokens"])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and len(pair.heads.parameters()) == 1


def test_one_layers_spans_drop_the_same_inputs(bases):
    """As one fused layer does."""
    model = twins.transformers_model(bases("llama")[0]).double().train()
    adapter = shaken(huggingface.attach(model, "tied_lora", ["attention_qkv"], rank=4, dropout=0.5), 1)
    attention, seen = model.model.layers[0].self_attn, {}
    x = torch.randn(1, 5, 48, dtype=torch.float64)
    for part in "qkv":
        seen[part] = getattr(attention, f"{part}_proj")(x)
    with adapter.disabled():
        seen = {part: seen[part] - getattr(attention, f"{part}_proj")(x) for part in "qkv"}
    named = adapter.named_tensors()
    B = named["attention_qkv.0.v"][:, None] * named["attention_qkv.B"] * named["attention_qkv.0.u"]
    outputs, B = torch.cat([seen[part][0].T for part in "qkv"]), torch.cat(separate(1.5 * B, 2, 8, 6))
    h = torch.linalg.lstsq(B, outputs).solution  # A times what was left of x: 4 numbers a token, of 80 outputs
    torch.testing.assert_close(B @ h, outputs)
    assert not torch.allclose(h, named["attention_qkv.A"] @ x[0].T)


@pytest.mark.parametrize(("kind", "target"), [("llama", "attention_qkv"), ("gpt2", "attention_v"), ("gpt2", "mlp_fc1")])
def test_what_reads_a_weight_of_several_layers_does_not_join_them(kind, target, bases, monkeypatch):
    model = twins.transformers_model(bases(kind)[0]).double()
    weight = huggingface.attach(model, "tied_lora", [target], rank=2).placed[1].weight()
    joined = FrozenWeight(weight(torch.float64))
    monkeypatch.setattr(type(weight), "__call__", lambda *_: pytest.fail("it is joined"))
    rows, columns = joined.tensor.shape
    for name, shape in (
        ("left", (rows, 3)), ("left_gradient", (3, columns)), ("right", (columns, 3)), ("right_gradient", (rows, 3)),
        *([("turned", (columns, 3)), ("turned_gradient", (3, rows))] if rows == columns else []),
    ):  # fmt: skip
        X = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(getattr(weight, name)(X), getattr(joined, name)(X))
    torch.testing.assert_close(weight.row_lengths(torch.float64), joined.row_lengths(torch.float64))
