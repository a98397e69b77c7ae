"""``tiedlora analyze`` on saved adapters of a real base, against numpy's decompositions of what was saved."""

import json

import forked
import numpy
import pytest
import torch
import toy
from typer.testing import CliRunner

from nemo_tiedlora import cli
from nemo_tiedlora.errors import UsageError

LAYERS, HIDDEN, RANK = 4, 32, 4


def analyze(*arguments):
    code, out, err = forked.script("-m", "nemo_tiedlora.cli", "analyze", *arguments, "--json")
    assert code == 0, err[-2000:]
    return json.loads(out)


@pytest.fixture
def adapter(finetuning, tmp_path):
    """Saves an adapter with random values: ``adapter(name, seed, peft_scheme=...)`` → its file and parameters."""

    def make(name, seed, **peft):
        model, _ = finetuning(**peft)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in model.adapter_keys:
                    parameter.normal_()
        model.setup_complete = True  # from here on NeMo saves the adapter, not the model
        model.save_to(str(tmp_path / name))
        values = {key: parameter.detach().double().numpy() for key, parameter in model.model.named_parameters()}
        return tmp_path / name, values

    return make


def value(values, name, layer=0):
    (found,) = [value for key, value in values.items() if f"layers.{layer}." in key and key.endswith(name)]
    return found


def phi(X, Y, i, j):
    U, V = numpy.linalg.svd(X)[0][:, :i], numpy.linalg.svd(Y)[0][:, :j]
    return numpy.linalg.norm(U.T @ V, "fro") ** 2 / min(i, j)


@pytest.mark.slow
def test_subspaces_of_two_adapters_and_of_the_base(files, adapter, tmp_path):
    settings = {"preset": "TL6", "rank": RANK}
    (first, ours), (second, theirs) = (
        adapter(f"{seed}.nemo", seed, peft_scheme="tied_lora", tied_lora_tuning=settings) for seed in (0, 1)
    )

    def delta(values, layer):
        A, B, u, v = (value(values, f".{name}", 0 if name in "AB" else layer) for name in "ABuv")
        return v[:, None] * B @ (u[:, None] * A)

    out = tmp_path / "new" / "figure.png"
    common = ["subspace", "--base", files["llama"], "--adapter", first, "--out", out]
    versus = {
        "ΔW left": (analyze(*common, "--other", second), lambda layer: delta(theirs, layer)),
        "ΔW right": (analyze(*common), lambda layer: value(ours, "linear_qkv.weight", layer).T),
    }
    for part, (found, other) in versus.items():
        found = found["targets"]["attention_qkv"][part]
        means = numpy.zeros((RANK, RANK))
        for layer in range(LAYERS):
            X = delta(ours, layer) if part == "ΔW left" else delta(ours, layer).T
            grid = [[phi(X, other(layer), i, j) for j in range(1, RANK + 1)] for i in range(1, RANK + 1)]
            numpy.testing.assert_allclose(found["layers"][str(layer)], grid, rtol=0, atol=1e-5)
            means += numpy.array(grid) / LAYERS
        numpy.testing.assert_allclose(found["mean"], means, rtol=0, atol=1e-5)
    assert out.read_bytes().startswith(b"\x89PNG") and json.loads(out.with_suffix(".json").read_text())["other"] == "W"


def test_conditional_factors_are_converted_by_one_map(files, adapter, tmp_path):
    settings = {"rank": RANK, "target_modules": ["attention_dense", "attention_k"]}
    saved, _ = adapter("cond.nemo", 0, peft_scheme="cond_lora", cond_lora_tuning=settings)
    found = analyze("conversion", "--base", files["llama"], "--adapter", saved, "--out", tmp_path / "figure.png")
    assert found == json.loads((tmp_path / "figure.json").read_text())
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    dense, k = found["targets"]["attention_dense"], found["targets"]["attention_k"]
    for similarity in (dense["A"], dense["B"], k["A"]):  # W of k is wide: many maps give its B
        numpy.testing.assert_allclose(similarity["similarity"], numpy.ones((LAYERS, LAYERS)), rtol=0, atol=1e-4)
    assert k["B"]["average"] < 0.9 and dense["random A"]["average"] < 0.3


def test_layers_are_those_that_groups_compares(files, tmp_path):
    (tmp_path / "text.txt").write_text("what is 1 plus 2?\nwhat is 3 plus 4? the answer is 7.\n")
    out = tmp_path / "layers.png"
    found = analyze("layers", "--base", files["llama"], "--data", tmp_path / "text.txt", "--out", out)
    similarity = numpy.array(found["similarity"])
    assert similarity.shape == (LAYERS, LAYERS) and (similarity == similarity.T).all()
    numpy.testing.assert_allclose(similarity.diagonal(), 1, rtol=0, atol=1e-6)
    others = similarity[~numpy.eye(LAYERS, dtype=bool)]
    assert others.max() < 1 and found["average"] == pytest.approx(others.mean(), rel=1e-9)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_refused_before_the_base_is_loaded(files, adapter, finetuning, tmp_path):
    ours, _ = adapter("ours.nemo", 0, peft_scheme="tied_lora", tied_lora_tuning={"rank": RANK})
    stock, _ = finetuning(**toy.STOCK_SCHEMES["lora"])
    stock.setup_complete = True
    stock.save_to(str(tmp_path / "stock.nemo"))
    base = ["--base", files["llama"]]
    for arguments, message in [
        (["subspace", *base, "--adapter", ours, "--out", "a.jpg"], "out='a.jpg': must end in .png"),
        (["subspace", *base, "--adapter", "missing.nemo"], "adapter='missing.nemo': no such file"),
        (["subspace", *base, "--adapter", ours, "--other", files["llama"]], "a whole model, not an adapter"),
        (["subspace", "--base", files["gpt"], "--adapter", ours], "made for another base"),
        (["conversion", *base, "--adapter", tmp_path / "stock.nemo"], "of scheme lora; only tied_lora"),
        (["layers", *base, "--data", ours, "--similarity", "euclid"], "similarity='euclid'"),
        (["layers", *base, "--data", "missing.txt"], "data='missing.txt': no such file"),
    ]:
        place = [] if "--out" in arguments else ["--out", tmp_path / "figure.png"]
        with pytest.raises(UsageError) as error:
            CliRunner().invoke(cli.app, ["analyze", *map(str, [*arguments, *place])], catch_exceptions=False)
        assert message in str(error.value)
    assert not list(tmp_path.glob("figure.*"))
