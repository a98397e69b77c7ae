"""Adapters on transformers models: the same files, sizes and outputs as NeMo's; they train, and come off again."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import random_adapters
import saved_models
import torch
import transformers
import twins
from by_hand import ENCODERS, contents, encoder, fused, separate
from peft import PeftModel
from torch.func import functional_call
from typer.testing import CliRunner

from nemo_tiedlora import huggingface
from nemo_tiedlora.checkpoint import Base, read
from nemo_tiedlora.checkpoint.adapter import Blueprint
from nemo_tiedlora.checkpoint.merge import Changes
from nemo_tiedlora.cli import app
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import count

#: Name → the model, the scheme and its settings: each method and each kind of target on separate and fused layers.
CASES = {
    "TL6": ("llama", "tied_lora", {"target_modules": ["all"], "alpha": 10.0}),
    "LoRA": ("llama", "tied_lora", {"preset": "LoRA", "target_modules": ["attention_q", "mlp_up"],
                                    "layer_selection": [1, 3]}),
    "VeRA": ("qwen2", "vera", {"target_modules": ["attention_qkv"], "alpha": 3.0}),
    "ShareLoRA": ("llama", "share_lora", {"groups": [[0, 1]], "target_modules": ["attention", "mlp_gate"]}),
    "CondLoRA": ("llama", "cond_lora", {"target_modules": ["attention_qkv", "mlp_fc1"], "deviation": 0.1}),
    "DynaLoRA": ("llama", "dyna_lora", {"inner": "tied_lora", "target_modules": ["attention_qkv", "mlp_fc2"]}),
    "LoRA-XS": ("llama", "lora_xs", {"target_modules": ["attention_qkv"], "rank": 3}),
    "Uni-LoRA": ("llama", "uni_lora", {"target_modules": ["attention_qkv"], "dimension": 300}),
    "DoRA": ("llama", "tied_lora", {"target_modules": ["all"], "dora": True, "alpha": 7.0}),
    "GPT-2": ("gpt2", "tied_lora", {"target_modules": ["all"], "dora": True}),
    "DoRA on parts": ("gpt2", "vera", {"target_modules": ["attention_v", "attention_q"], "dora": True}),
    "GPT-2's parts": ("gpt2", "cond_lora", {"target_modules": ["attention_q", "attention_v", "mlp_fc1"],
                                            "deviation": 0.1}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_file_of_nemos_computes_the_same_here_and_is_written_again_byte_by_byte(name, bases, tmp_path):
    kind, scheme, settings = CASES[name]
    saved, base = bases(kind)
    made = random_adapters.adapter_for(base, tmp_path / "nemo", scheme, **settings)
    expected = twins.nemo_logits(base, tmp_path / "nemo")
    model = twins.transformers_model(saved)
    plain = model(twins.IDS).logits
    assert (expected - plain).abs().max() > 0.5
    modules = [id(module) for module in model.modules()]
    adapter = huggingface.load(model, tmp_path / "nemo")
    torch.testing.assert_close(model(twins.IDS).logits, expected, atol=1e-4, rtol=1e-4)
    with adapter.disabled():
        assert torch.equal(model(twins.IDS).logits, plain)
    adapter.save(tmp_path / "here")
    assert contents(tmp_path / "here") == contents(tmp_path / "nemo")
    adapter.save(tmp_path / "here.nemo")
    assert read(tmp_path / "here.nemo").settings == made.settings
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count(made.variant, made.sites).trainable
    adapter.export_peft(tmp_path / "peft")
    theirs = PeftModel.from_pretrained(twins.transformers_model(saved), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(twins.IDS).logits, expected, atol=1e-4, rtol=1e-4)
    adapter.merge()
    torch.testing.assert_close(model(twins.IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert [id(module) for module in model.modules()] == modules


@pytest.mark.parametrize("scheme", ["tied_lora", "cond_lora"])
def test_forward_and_gradients_on_separate_projections_follow_the_equation(scheme, bases):
    saved, _ = bases("llama")
    model = twins.transformers_model(saved).double()
    adapter = huggingface.attach(model, scheme, ["attention_qkv"], rank=4, alpha=6.0)
    named = adapter.named_tensors()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in named.values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
    logits = model(twins.IDS).logits
    logits.square().mean().backward()
    ours = {key: tensor.grad.clone() for key, tensor in named.items()}
    model.zero_grad()
    weights = {}
    for layer in range(3):
        names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv"]
        W = fused(*(model.get_parameter(name) for name in names), 2, 8)
        if scheme == "tied_lora":
            A = named[f"attention_qkv.{layer}.u"][:, None] * named["attention_qkv.A"]
            B = named[f"attention_qkv.{layer}.v"][:, None] * named["attention_qkv.B"]
        else:
            A, B = named["attention_qkv.theta_A"].T @ W, W @ named["attention_qkv.theta_B"]
        weights |= dict(zip(names, separate(W + 1.5 * B @ A, 2, 8, 6), strict=True))
    with adapter.disabled():
        expected = functional_call(model, weights, (twins.IDS,)).logits
    expected.square().mean().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, named[key].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "targets", "same"),
    [
        ("llama", ["q_proj", "v_proj"], ["attention_q", "attention_v"]),
        ("llama", ["mlp.*_proj"], ["mlp_gate", "mlp_up", "mlp_fc2"]),
        ("llama", r"model\.layers\.\d+\.self_attn\.o_proj", ["attention_dense"]),
        ("gpt2", ["c_attn"], ["attention_qkv"]),
        ("gpt2", "all-linear", ["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"]),
    ],
)
def test_what_is_trained_here_is_read_by_nemo(kind, targets, same, bases, tmp_path):
    saved, base = bases(kind)
    model = twins.transformers_model(saved)
    adapter = huggingface.attach(model, "tied_lora", targets, rank=4)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-1))
    adapter.attach_to(optimizer)
    losses = []
    for _ in range(3):
        losses.append(model(twins.IDS, labels=twins.IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapter.save(tmp_path / "adapter")
    assert read(tmp_path / "adapter").settings["target_modules"] == same
    with torch.no_grad():
        expected = model(twins.IDS).logits
    torch.testing.assert_close(twins.nemo_logits(base, tmp_path / "adapter"), expected, atol=1e-4, rtol=1e-4)


def test_what_dyna_lora_sees_of_separate_projections_is_their_joined_output(bases):
    saved, _ = bases("llama")
    model = twins.transformers_model(saved).train()
    adapter = huggingface.attach(model, "dyna_lora", ["attention_qkv"], rank=2, active=1, period=1)
    seen = []
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        for part in (layer.q_proj, layer.k_proj, layer.v_proj):
            part.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
    adapter.attach_to(optimizer)
    model(twins.IDS, labels=twins.IDS).loss.backward()
    optimizer.step()
    expected = [torch.cat(seen[n : n + 3], -1).flatten(1).norm(dim=1).sum().item() for n in range(0, len(seen), 3)]
    torch.testing.assert_close(torch.tensor(adapter.variant.importance), torch.tensor(expected))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("scheme", ["tied_lora", "vera", "share_lora", "cond_lora", "dyna_lora", "lora_xs"])
def test_every_method_on_an_encoder(name, scheme, tmp_path):
    model, ids = encoder(name), torch.arange(24).view(2, 12) + 3
    adapter = huggingface.attach(model, scheme, ["query", "value"], rank=4)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(0.1))
    adapter.attach_to(optimizer)
    before, head = model(ids).logits, [parameter.detach().clone() for parameter in model.classifier.parameters()]
    for _ in range(2):
        model(ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model(ids).logits
    assert (after - before).abs().max() > 1e-6
    assert not any(map(torch.equal, head, model.classifier.parameters()))
    adapter.save(tmp_path / "adapter")
    other = encoder(name)
    again = huggingface.load(other, tmp_path / "adapter")
    torch.testing.assert_close(other(ids).logits, after, rtol=1e-9, atol=1e-9)
    again.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "adapter")
    place = f"{name}.encoder.layer.attention.self"
    if scheme == "cond_lora":
        assert sum(tensor.numel() for tensor in adapter.named_tensors().values()) == 2 * 4 * (24 + 24)
        weights = dict(adapter.heads.tensors)
        for layer in range(3):
            for part in ("query", "value"):
                weight = f"{name}.encoder.layer.{layer}.attention.self.{part}.weight"
                W, theta = model.get_parameter(weight), adapter.named_tensors()
                A, B = theta[f"{place}.{part}.theta_A"].T @ W, W @ theta[f"{place}.{part}.theta_B"]
                weights[weight] = W + B @ A
        with adapter.disabled():
            expected = functional_call(model, weights, (ids,)).logits
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adapter.merge()(ids).logits, after, rtol=1e-9, atol=1e-9)


def dyna(bases):
    model = twins.transformers_model(bases("llama")[0])
    adapter = huggingface.attach(model, "dyna_lora", ["attention_qkv"], rank=2, active=1, period=1)
    return adapter, torch.optim.AdamW(adapter.parameter_groups(1e-2))


def trainer(folder, adapter, optimizer, callbacks, steps=4):
    draw = torch.Generator().manual_seed(3)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 300, (8, 12), generator=draw)]
    args = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, save_steps=2, lr_scheduler_type="constant",
        learning_rate=1e-2, report_to=[], logging_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(
        adapter.model, args, train_dataset=rows, optimizers=(optimizer, None), callbacks=callbacks
    )


def test_trainer_lets_dyna_lora_take_turns_and_goes_on_from_its_checkpoint(bases, tmp_path):
    ends = []
    for steps, resume in ((4, None), (2, None), (4, str(tmp_path / "2" / "checkpoint-2"))):
        adapter, optimizer = dyna(bases)
        run = trainer(tmp_path / str(steps), adapter, optimizer, [adapter.callback()], steps)
        run.train(resume_from_checkpoint=resume)
        assert adapter.variant.step == steps and sum(adapter.variant.active_steps) == steps
        ends.append((adapter.variant.state_dict(), adapter.named_tensors()))
    (whole, tensors), _, (resumed, again) = ends
    assert resumed == whole and len({tuple(choice["active"]) for choice in whole["log"]}) > 1
    for key, tensor in tensors.items():
        assert torch.equal(again[key], tensor), key
    # What Trainer saved is the model under its own names, beside the adapter.
    saved = twins.transformers_model(tmp_path / "2" / "checkpoint-2")
    with adapter.disabled(), torch.no_grad():
        assert torch.equal(saved(twins.IDS).logits, adapter.model.eval()(twins.IDS).logits)


def test_what_trainer_is_not_told_is_an_error_at_the_first_step(bases, tmp_path):
    adapter, optimizer = dyna(bases)
    before = {key: tensor.detach().clone() for key, tensor in adapter.named_tensors().items()}
    with pytest.raises(UsageError, match="dyna_lora takes part in every step.*adapter.parameter_groups"):
        trainer(tmp_path, adapter, optimizer, []).train()
    with pytest.raises(UsageError, match="is in none of its groups; make it of adapter.parameter_groups"):
        trainer(tmp_path, adapter, None, [adapter.callback()]).train()
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.named_tensors().items())


def vision():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    return model, {"pixel_values": torch.ones(2, 3, 16, 16)}


def encoder_decoder():
    sizes = {"vocab_size": 50, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    ids = torch.arange(16).view(2, 8) + 3
    return model, {"input_ids": ids, "decoder_input_ids": ids}


def image_and_text():
    text = transformers.LlamaConfig(**(saved_models.SIZES | {"num_hidden_layers": 2}))
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    image = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(image, text, image_token_index=335, vision_feature_layer=-1)
    )
    ids = torch.cat([torch.full((2, 4), 335), torch.arange(8).view(2, 4) + 3], 1)
    return model, {"input_ids": ids, "pixel_values": torch.ones(2, 3, 16, 16)}


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "targets", "sites"),
    [
        (vision, "all-linear", 2 * 6),
        (encoder_decoder, ["q", "v"], 2 * 3 * 2),
        (image_and_text, ["q_proj", "v_proj"], 2 * 2 * 2),
    ],
)
def test_other_kinds_of_models_take_adapters_of_their_own_layers(make, targets, sites):
    torch.manual_seed(0)
    model, inputs = make()
    model = model.double().eval()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    before = model(**inputs).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = huggingface.attach(model, "tied_lora", targets, rank=4)
    assert len(adapter.placed) == sites and "tied_lora, rank 4" in str(adapter)
    for tensor in adapter.named_tensors().values():
        tensor += 0.3 * torch.randn_like(tensor)
    after = model(**inputs).logits
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(adapter.merge()(**inputs).logits, after, rtol=1e-9, atol=1e-9)
    adapter.unmerge()
    adapter.detach()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-12, atol=1e-12)


def test_a_weight_that_is_an_embeddings_too_is_refused():
    model, _ = encoder_decoder()
    with pytest.raises(UsageError, match="targets='lm_head': its weight is also shared.weight"):
        huggingface.attach(model, "tied_lora", ["q", "lm_head"], rank=4)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_give_the_same_gradients(reentrant, bases):
    gradients = []
    for recomputed in (False, True):
        model = twins.transformers_model(bases("llama")[0]).train()
        adapter = huggingface.attach(model, "cond_lora", ["attention_qkv"], rank=4, alpha=6.0)
        adapter.attach_to(torch.optim.SGD(adapter.parameter_groups(1.0)))
        with torch.no_grad():
            adapter.named_tensors()["attention_qkv.theta_B"].fill_(0.01)
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(twins.IDS, labels=twins.IDS, use_cache=False).loss.backward()
        gradients.append({key: tensor.grad for key, tensor in adapter.named_tensors().items()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_layers_of_other_shapes_share_nothing():
    model, _ = encoder_decoder()
    named = huggingface.attach(model, "tied_lora", ["wi", "wo", "q"], rank=4, preset="TL5").named_tensors()
    shapes = {key: tuple(tensor.shape) for key, tensor in named.items() if key.endswith("DenseReluDense.wi.A")}
    assert shapes == {f"{side}.block.layer.DenseReluDense.wi.A": (4, 24) for side in ("encoder", "decoder")}
    assert len(named) == 2 * (2 * 2 + 3)


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [
        (["q_prj"], {}, "targets='q_prj': no linear layer has this name; did you mean 'q_proj'. Valid: q_proj, k_proj"),
        (["attention_qkw"], {}, "targets='attention_qkw': no linear layer has this name"),
        (["attention_qkv", "q_proj"], {}, "targets='attention_q': is inside a fused projection"),
        (["layers.1.self_attn.q_proj"], {}, "names 1 of 3 layers; name all and choose with layer_selection"),
        (["lm_head"], {}, "targets='lm_head': no linear layer has this name"),
        ([], {}, "targets=.*: write a list of names"),
        (["("], {}, "no linear layer has this name"),
        (["q_proj"], {"rang": 4}, "rang=4: unknown setting; did you mean 'rank'"),
        (["q_proj"], {"scheme": "tied_lore"}, "did you mean 'tied_lora'"),
        (["q_proj"], {"rank": 4000}, "rank=4000: larger than the layer"),
        (["q_proj"], {"layer_selection": [4]}, "layer_selection=4: the model has layers 1 to 3"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_and_changes_nothing(targets, settings, message, bases):
    model = twins.transformers_model(bases("llama")[0])
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(UsageError, match=message) as error:
        huggingface.attach(model, **({"scheme": "tied_lora"} | settings), targets=targets)
    assert "\n" not in str(error.value)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before


def test_a_file_goes_onto_the_model_it_was_trained_on_only(bases, tmp_path):
    saved, base = bases("llama")
    random_adapters.adapter_for(base, tmp_path / "adapter", "tied_lora", target_modules=["attention_qkv"])
    other = twins.transformers_model(saved)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    with pytest.raises(UsageError, match="its weights, in float32 here, are not those that the adapter was trained on"):
        huggingface.load(other, tmp_path / "adapter")
    adapter = huggingface.load(other, tmp_path / "adapter", force=True)
    with pytest.raises(UsageError, match="name='adapter': the model has an adapter of this name already"):
        huggingface.load(other, tmp_path / "adapter", force=True)
    assert all(tensor.requires_grad for tensor in adapter.named_tensors().values())
    adapter.merge()
    with pytest.raises(UsageError, match="is merged; save it before"):
        adapter.save(tmp_path / "merged")
    for kind, message in (("mistral", "made for another base: kv_channels"), ("gpt2", "made for another base")):
        with pytest.raises(UsageError, match=message):
            huggingface.load(twins.transformers_model(bases(kind)[0]), tmp_path / "adapter")
    with pytest.raises(UsageError, match="attention_qkv.*a word for LlamaForCausalLM"):
        huggingface.load(encoder("bert"), tmp_path / "adapter")
    with pytest.raises(UsageError, match="BertForSequenceClassification.*export_peft knows the files of Llama"):
        huggingface.attach(encoder("bert"), "tied_lora", ["query"], rank=2).export_peft(tmp_path / "bert")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_saved_model_has_the_models_own_names_whether_the_adapter_is_on_or_off(bases, tmp_path):
    saved, _ = bases("gpt2")
    model = twins.transformers_model(saved)
    adapter = huggingface.attach(model, "tied_lora", ["c_attn"], rank=2)
    with torch.no_grad():
        adapter.named_tensors()["attention_qkv.0.v"].normal_()
        adapted = model(twins.IDS).logits
    model.save_pretrained(tmp_path / "on")
    assert torch.equal(twins.logits(tmp_path / "on"), twins.logits(saved))
    adapter.merge().save_pretrained(tmp_path / "merged")
    assert {name for name in model.state_dict() if "adapter" in name} == set()
    torch.testing.assert_close(twins.logits(tmp_path / "merged"), adapted, atol=1e-4, rtol=1e-4)


def test_nemo_is_not_imported(tmp_path):
    code = """
import sys, torch, transformers
from nemo_tiedlora import huggingface
assert "transformers" in sys.modules
sizes = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
adapter = huggingface.attach(model, "tied_lora", ["attention_qkv"], rank=2)
adapter.callback()
adapter.save(sys.argv[1])
adapter.detach()
huggingface.load(model, sys.argv[1])
assert not {"nemo", "megatron", "lightning", "pytorch_lightning"} & set(sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "adapter")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [
        ({"q": {"in": 4, "out": 4, "layers": [0, 0]}}, 2),
        ({"q": {"in": 4, "out": 4, "layers": [2]}}, 2),
        ({"q": {"in": 4, "out": 4, "layers": []}}, 2),
        ({"q": {"in": 4, "out": -4, "layers": [0]}}, 2),
        ({"q": {"in": 4, "out": 4}}, 2),
        ({"q": {"in": 4, "out": 10**12, "layers": [0]}}, 2),
        ({"q": {"in": 4, "out": 4, "layers": [0]}}, 10**9),
        ({"q": [4, 4, 0]}, 2),
        ({}, 2),
        (["q"], 2),
    ],
)
def test_a_file_of_layers_that_cannot_be_is_refused(kinds, layers):
    with pytest.raises(UsageError, match=r"base\."):
        Blueprint("tied_lora", {"rank": 2}, Base({"num_layers": layers, "kinds": kinds})).sites  # noqa: B018


def test_a_file_of_an_encoder_goes_onto_such_an_encoder_only(tmp_path):
    adapter = huggingface.attach(encoder("bert"), "tied_lora", ["query"], rank=2)
    assert "classifier: trained whole, 50 parameters more" in str(adapter)
    with pytest.raises(UsageError, match="name a folder: NeMo does not run a BertFor"):
        adapter.save(tmp_path / "adapter.nemo")
    adapter.save(tmp_path / "adapter")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "adapter"), "--json"])
    assert json.loads(shown.stdout)["trainable"] == 2 * 2 * 24 + 3 * (2 + 24)
    with pytest.raises(UsageError, match="RobertaForSeq.*has not layer 0 of bert.encoder.layer.attention.self.query"):
        huggingface.load(encoder("roberta"), tmp_path / "adapter")
    with pytest.raises(UsageError, match="for a model of another kind than NeMo runs"):
        Changes(read(tmp_path / "adapter"))
    heads = tmp_path / "adapter" / "heads.safetensors"
    content = heads.read_bytes()
    for damaged, message in ((None, "there is no heads.safetensors in it"), (content[:-9], "damaged or cut off")):
        heads.unlink() if damaged is None else heads.write_bytes(damaged)
        model = encoder("bert")
        with pytest.raises(UsageError, match=message):
            huggingface.load(model, tmp_path / "adapter")
        assert all(parameter.requires_grad for parameter in model.parameters())
    heads.write_bytes(content)
    model = encoder("bert")
    model.classifier = torch.nn.Linear(24, 3).double()
    with pytest.raises(UsageError, match=r"classifier.bias in it is .2,.; of a BertForSeq.* it is .3,."):
        huggingface.load(model, tmp_path / "adapter")


def test_the_lines_in_the_docs_run(bases, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    loop, several, with_trainer, spread = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = twins.transformers_model(bases("llama")[0])
    scope = {"model": model, "torch": torch, "transformers": transformers, "input_ids": twins.IDS}
    exec(loop, scope)
    assert not torch.equal(scope["plain"], model(twins.IDS).logits)
    assert torch.equal(twins.logits(tmp_path / "merged"), model(twins.IDS).logits)
    scope["model"] = model = twins.transformers_model(bases("llama")[0])
    exec(several, scope)
    assert list(scope["adapters"]) == ["french", "law"] and scope["adapters"].merged == {"french": 0.7, "law": 0.3}
    scope["adapter"] = huggingface.attach(model, "dyna_lora", ["q_proj"], rank=2)
    scope["rows"] = [{"input_ids": row, "labels": row} for row in twins.IDS]
    scope["args"] = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    exec(with_trainer, scope)
    assert scope["adapter"].variant.step == 2
    given = []
    scope |= {"mesh": None, "fully_shard": lambda module, mesh, ignored_params: given.append(ignored_params)}
    exec(spread, scope)  # what it comes to is in test_accelerate.py, which has two processes
    assert given == [set(scope["adapter"].parameters())] * 4
