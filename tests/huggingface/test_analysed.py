"""Models that transformers saved, looked into without NeMo: the numbers are those of the equations, and NeMo's."""

import json
import subprocess
import sys

import numpy
import pytest
import random_adapters
import saved_models
import torch
import toy
import transformers
from typer.testing import CliRunner

from nemo_tiedlora import huggingface
from nemo_tiedlora.cli import app
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.analysed import SavedModel
from nemo_tiedlora.job.loaded import NemoBase
from nemo_tiedlora.variants import SharedConfig

HIDDEN, LAYERS, RANK = 24, 3, 4
TEXTS = ["what is 1 plus 2?", "what is 30 plus 4? it is 34.", "what is 5 plus 12?"]
VALUE = "roberta.encoder.layer.attention.self.value"
#: Runs commands in one process, prints what each printed, and which of NeMo's packages were imported.
RUN = """
import json, sys
from typer.testing import CliRunner
from nemo_tiedlora.cli import app
runs = [CliRunner().invoke(app, arguments, catch_exceptions=False) for arguments in json.loads(sys.argv[1])]
imported = [name for name in ("nemo", "megatron", "lightning") if name in sys.modules]
print(json.dumps([[run.exit_code for run in runs], [json.loads(run.stdout) for run in runs], imported]))
"""


def encoder(folder):
    """A random one in ``folder``."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=336, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=40,
        initializer_range=0.3, max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    saved_models.tokenizer(folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The encoder's folder, texts, and adapters that were trained on it: as LoRA, CondLoRA and DynaLoRA train."""
    folder = tmp_path_factory.mktemp("encoder")
    model = encoder(folder / "model")
    (folder / "text.txt").write_text("\n".join(TEXTS))
    ids = torch.arange(24).view(2, 12) + 5
    for name, scheme, settings in (
        ("lora", "tied_lora", {"preset": "LoRA"}),
        ("cond", "cond_lora", {}),
        ("dyna", "dyna_lora", {"active": 2, "period": 1}),
    ):
        adapter = huggingface.attach(model, scheme, ["self.query", "self.value"], rank=RANK, **settings)
        optimizer = torch.optim.AdamW(adapter.parameter_groups(0.1))
        adapter.attach_to(optimizer)
        for _ in range(4):
            model(ids, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapter.save(folder / name)
        history = adapter.variant.history()
        adapter.detach()
    (folder / "allocations.json").write_text(json.dumps(history))
    return folder


@pytest.fixture(scope="module")
def said(saved):
    """What the commands say of it, in a process that has not imported NeMo."""
    base = ["--base", str(saved / "model")]
    data = ["--data", str(saved / "text.txt")]
    commands = [
        ["groups", *base, *data, "--threshold", "0.5", "--targets", "query,value", "--out", str(saved / "groups.json")],
        ["analyze", "layers", *base, *data, "--out", str(saved / "layers.png")],
        ["analyze", "conversion", *base, "--adapter", str(saved / "lora"), "--out", str(saved / "lora.png")],
        ["analyze", "conversion", *base, "--adapter", str(saved / "cond"), "--out", str(saved / "cond.png")],
        ["analyze", "subspace", *base, "--adapter", str(saved / "lora"), "--other", str(saved / "cond"),
         "--out", str(saved / "subspace.png")],
        ["analyze", "allocation", str(saved / "allocations.json"), "--out", str(saved / "steps.png")],
    ]  # fmt: skip
    command = [sys.executable, "-c", RUN, json.dumps([[*arguments, "--json"] for arguments in commands])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    codes, found, imported = json.loads(done.stdout)
    assert codes == [0] * len(commands) and imported == []
    return dict(zip(("groups", "layers", "lora", "cond", "subspace", "steps"), found, strict=True))


def similarity(model, folder):
    """By transformers' own list of hidden states."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    angles = []
    for text in TEXTS:
        states = model.base_model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        last = torch.stack([state[0, -1] for state in states[1:]]).double().numpy()
        last /= numpy.linalg.norm(last, axis=1, keepdims=True)
        angles.append(1 - numpy.arccos((last @ last.T).clip(-1, 1)) / numpy.pi)
    return numpy.mean(angles, 0)


@torch.no_grad()
def test_groups_of_an_encoder_are_those_of_its_layers_outputs_and_attach_takes_them(saved, said):
    model = transformers.RobertaForSequenceClassification.from_pretrained(saved / "model").eval()
    expected = similarity(model, saved / "model")
    numpy.testing.assert_allclose(said["layers"]["similarity"], expected, atol=1e-4)
    written = json.loads((saved / "groups.json").read_text())
    numpy.testing.assert_allclose(written["similarity"], expected, atol=1e-4)
    groups = said["groups"]["groups"]
    assert groups and all(expected[i][j] >= 0.5 for group in groups for i in group for j in group)
    layers = LAYERS - sum(len(group) - 1 for group in groups)
    assert said["groups"]["trainable"] == 2 * layers * 8 * 2 * HIDDEN and layers < LAYERS
    adapter = huggingface.attach(model, "share_lora", ["query", "value"], groups=str(saved / "groups.json"))
    assert adapter.variant.groups == groups
    assert sum(tensor.numel() for tensor in adapter.named_tensors().values()) == said["groups"]["trainable"]
    assert (saved / "groups.png").read_bytes().startswith(b"\x89PNG")


def tensors(folder):
    """An adapter's, whose layers are not stacked here."""
    from nemo_tiedlora.checkpoint import read

    return {key: tensor.double().numpy() for key, tensor in read(folder).tensors.items()}


def phi(X, Y, rank=RANK):
    U, V = (numpy.linalg.svd(matrix)[0][:, :rank] for matrix in (X, Y))
    return numpy.linalg.norm(U.T @ V, "fro") ** 2 / rank


def test_conversion_matrices_of_lora_and_of_cond_lora_on_an_encoder(saved, said):
    model = transformers.RobertaForSequenceClassification.from_pretrained(saved / "model")
    weights = [layer.attention.self.value.weight.detach().double().numpy() for layer in model.roberta.encoder.layer]
    lora = tensors(saved / "lora")
    C_A = [numpy.linalg.inv(W).T @ lora[f"{VALUE}.{number}.A"].T for number, W in enumerate(weights)]
    C_B = [numpy.linalg.inv(W) @ lora[f"{VALUE}.{number}.B"] for number, W in enumerate(weights)]
    found = said["lora"]["targets"][VALUE]
    assert found["layers"] == [0, 1, 2] and len(said["lora"]["targets"]) == 2
    for name, matrices in (("A", C_A), ("B", C_B)):
        expected = [[phi(X, Y) for Y in matrices] for X in matrices]
        numpy.testing.assert_allclose(found[name]["similarity"], expected, atol=1e-5)
    for target in said["cond"]["targets"].values():  # one map for all layers
        for name in "AB":
            numpy.testing.assert_allclose(target[name]["similarity"], numpy.ones((LAYERS, LAYERS)), atol=1e-4)
        assert target["random A"]["average"] < 0.5
    theta = tensors(saved / "cond")
    part = said["subspace"]["targets"][VALUE]["B"]["layers"]
    for number, W in enumerate(weights):
        expected = phi(lora[f"{VALUE}.{number}.B"], W @ theta[f"{VALUE}.theta_B"])
        assert part[str(number)][-1][-1] == pytest.approx(expected, abs=1e-4)


def test_steps_of_dyna_lora_on_an_encoder_are_drawn(saved, said):
    found = said["steps"]
    assert found["targets"] == ["roberta.encoder.layer.attention.self.query", VALUE]
    assert found["layers"] == [0, 1, 2] and sum(map(sum, found["active_steps"])) == 4 * 2
    assert (saved / "steps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", [transformers.RobertaModel, transformers.RobertaForMaskedLM])
def test_the_base_may_be_saved_with_another_head_or_none(kind, saved, tmp_path):
    kind.from_pretrained(saved / "model").save_pretrained(tmp_path)
    base, own = SavedModel(tmp_path), SavedModel(saved / "model")
    base.check(saved / "cond", "adapter")
    pairs = zip(base.adapted(saved / "cond").items(), own.adapted(saved / "cond").items(), strict=True)
    for (site, layer), (same, expected) in pairs:
        assert site == same
        torch.testing.assert_close(layer.factors.B, expected.factors.B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_base_may_be_saved_in_another_type_than_it_was_trained_in(dtype, saved, tmp_path):
    model = transformers.RobertaModel.from_pretrained(saved / "model").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    adapter = huggingface.attach(model.to(dtype), "vera", ["query"], rank=2)
    adapter.save(tmp_path / "adapter")
    SavedModel(tmp_path / "model").check(tmp_path / "adapter", "adapter")
    with pytest.raises(UsageError, match="adapter=.*: trained on other weights than those in"):
        SavedModel(tmp_path / "model").check(saved / "lora", "adapter")


def test_both_hosts_see_the_same_in_a_llama(bases, tmp_path):
    folder, base = bases("llama")
    here = SavedModel(folder)
    random_adapters.adapter_for(base, tmp_path / "adapter", "cond_lora", target_modules=["attention_qkv", "mlp_up"])
    assert here.targets == NemoBase(str(base)).targets
    config = SharedConfig(groups=[[0, 1]], target_modules=here.targets)
    assert here.sizes(config) == NemoBase(str(base)).sizes(config)
    with toy.clean_megatron():
        nemo = NemoBase(str(base))
        nemo.check(tmp_path / "adapter", "adapter")
        expected = nemo.similarity(TEXTS, 8, "angular")
    numpy.testing.assert_allclose(here.similarity(TEXTS, 8, "angular"), expected, atol=1e-4)
    here.check(tmp_path / "adapter", "adapter")
    with toy.clean_megatron():
        adapted = nemo.adapted(tmp_path / "adapter").items()
        for (site, layer), (same, theirs) in zip(here.adapted(tmp_path / "adapter").items(), adapted, strict=True):
            assert site == same
            torch.testing.assert_close(layer.weight(torch.float64), theirs.weight(torch.float64))
            for ours, other in zip(layer.factors[:2], theirs.factors[:2], strict=True):
                torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_of_an_image_and_text_model_the_layers_that_texts_go_through_are_compared(tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    image = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(image, saved_models.config("llama"), image_token_index=335, vision_feature_layer=-1)
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer = saved_models.tokenizer(tmp_path)
    seen = []
    for layer in model.language_model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output[0][0, -1]))
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    model.language_model(ids)
    (found,) = SavedModel(tmp_path).layer_outputs(TEXTS[:1], 64)
    torch.testing.assert_close(found, torch.stack(seen))


def refused(message, *arguments):
    with pytest.raises(UsageError) as error:
        CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert message in str(error.value) and "\n" not in str(error.value)


def changed(folder, saved, **fields):
    """A copy of the model with other fields in its config."""
    folder.mkdir()
    for file in (saved / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_does_not_fit_is_refused_in_one_line(saved, bases, tmp_path):
    base, data = ["--base", saved / "model"], ["--data", saved / "text.txt"]
    out = ["--out", tmp_path / "out.png"]
    llama, nemo = bases("llama")
    random_adapters.adapter_for(nemo, tmp_path / "nemos", "tied_lora")
    own = changed(tmp_path / "own", saved, architectures=["MyModel"], auto_map={"AutoModel": "mine.MyModel"})
    (own / "mine.py").write_text("raise SystemExit('was run')")
    deeper = changed(tmp_path / "deeper", saved, num_hidden_layers=LAYERS + 1)
    other = changed(tmp_path / "other", saved)
    wordless = changed(tmp_path / "wordless", saved)
    (wordless / "tokenizer.json").unlink()
    cut = changed(tmp_path / "cut", saved)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    pickled = changed(tmp_path / "pickled", saved)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    model = transformers.RobertaForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        model.roberta.encoder.layer[1].attention.self.value.weight[0, 0] += 1
    model.save_pretrained(other)
    t5 = transformers.T5Config(vocab_size=336, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    saved_models.tokenizer(tmp_path / "t5")
    conversion = ["analyze", "conversion", *out, "--adapter"]
    refused("has architectures=['MyModel']", *conversion, saved / "lora", "--base", own)
    refused("the tensor roberta.encoder.layer.3.", *conversion, saved / "lora", "--base", deeper)
    refused("transformers cannot load it", *conversion, saved / "lora", "--base", cut)
    refused("what is there is pickled", *conversion, saved / "lora", "--base", pickled)
    refused("trained on other weights than those", *conversion, saved / "lora", "--base", other)
    refused("made for another base: a model with roberta", *conversion, saved / "lora", "--base", llama)
    refused("made for a model that NeMo runs; the base is a Rob", *conversion, tmp_path / "nemos", *base)
    refused("made for a model of another kind than NeMo runs", *conversion, saved / "lora", "--base", nemo)
    refused("no such file", *conversion, tmp_path / "missing", *base)
    refused("other=", "analyze", "subspace", *out, *base, "--adapter", saved / "lora", "--other", tmp_path / "nemos")
    layers = ["analyze", "layers", *out]
    refused("there is no tokenizer.json", *layers, *data, "--base", wordless)
    refused("an encoder and a decoder", *layers, *data, "--base", tmp_path / "t5")
    (tmp_path / "long.txt").write_text("what is 1 plus 2? " * 40)
    refused("length=512: the model cannot take", *layers, *base, "--data", tmp_path / "long.txt")
    refused("targets='attention_qkv'", "groups", *base, *data, "--targets", "attention_qkv", "--out", "groups.json")
    assert not list(tmp_path.glob("out.*"))
