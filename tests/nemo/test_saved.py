"""Adapters of real NeMo models as canonical files: saved, loaded, merged, and NeMo's own converted."""

import json
import tarfile
from dataclasses import replace

import pytest
import torch
import toy
from test_adapter import EVERY_MATRIX, logits

from nemo_tiedlora.checkpoint import read, write
from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.checkpoint.legacy import convert
from nemo_tiedlora.checkpoint.merge import merge, unmerge
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants.init import Init

CASES = {
    "lora": ("tied_lora", {"preset": "LoRA"}),
    "TL1": ("tied_lora", {"preset": "TL1"}),
    "TL6": ("tied_lora", {"preset": "TL6", "layer_selection": [2, 4], "alpha": 6}),
    "vera": ("vera", {}),
    "share": ("share_lora", {"groups": [[0, 1]], "train": ["A", "B", "u", "v"], "rank_expansion": 5}),
    "cond": ("cond_lora", {"groups": [[2, 3]]}),
    "dyna": ("dyna_lora", {"inner": "tied_lora", "settings": {"preset": "TL5"}}),
    "xs": ("lora_xs", {}),
    "uni": ("uni_lora", {"dimension": 500}),
    "dora": ("tied_lora", {"preset": "TL6", "dora": True}),
    "dyna-cond-dora": ("dyna_lora", {"inner": "cond_lora", "dora": True}),
}


def adapted(finetuning, scheme, settings, base="llama"):
    """A model whose adapter is far from its start."""
    torch.manual_seed(0)
    model, _ = finetuning(base, peft_scheme=scheme, **{f"{scheme}_tuning": {"rank": 4} | settings})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.adapter_keys:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.setup_complete = True  # from here on NeMo saves the adapter, not the model
    return model


def cases_on_targets():
    """Every case on fused and on single matrices, as test parameters: `make test` takes every second pair."""
    for number, case in enumerate(CASES):
        for kind, targets in enumerate((["all"], EVERY_MATRIX)):
            marks = [pytest.mark.thorough] if (number + kind) % 2 else []
            yield pytest.param(case, targets, id=f"{case}-{['fused', 'single'][kind]}", marks=marks)


@pytest.mark.parametrize(("case", "targets"), cases_on_targets())
def test_saved_loaded_and_merged_give_the_same_logits(finetuning, files, tmp_path, case, targets):
    scheme, settings = CASES[case]
    model = adapted(finetuning, scheme, settings | {"target_modules": targets})
    expected = logits(model)
    model.save_to(str(tmp_path / "adapter.nemo"))
    with tarfile.open(tmp_path / "adapter.nemo") as archive:
        assert archive.getnames() == ["model_config.yaml", "adapter_config.json", "adapter_model.safetensors"]
    saved = read(tmp_path / "adapter.nemo")
    bank = model.adaptations[scheme].bank
    computed = {f"{key[:-1]}{part}" for key in bank.trained() for part in "AB" if scheme == "lora_xs"}
    assert set(saved.tensors) == set(bank.trained()) | computed
    assert all(torch.equal(tensor, bank.named_tensors()[key]) for key, tensor in saved.tensors.items())
    assert set(saved.base.checksums) == set(saved.paths)

    fresh, _ = finetuning(peft_scheme="none")
    fresh.load_adapters(str(tmp_path / "adapter.nemo"))
    assert torch.equal(logits(fresh), expected)

    facts = merge(files["llama"], tmp_path / "adapter.nemo", tmp_path / "merged.nemo")
    assert facts["base_checksum"] == "matches"
    files["merged"] = tmp_path / "merged.nemo"
    whole, _ = finetuning("merged", peft_scheme="none")
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-4)

    if scheme == "cond_lora" or settings.get("dora"):
        with pytest.raises(UsageError, match="cannot be taken out"):
            unmerge(tmp_path / "merged.nemo", tmp_path / "adapter.nemo", tmp_path / "back.nemo")
        return
    back = unmerge(tmp_path / "merged.nemo", tmp_path / "adapter.nemo", tmp_path / "back.nemo")
    with open_base(tmp_path / "back.nemo") as after, open_base(files["llama"]) as before:
        assert after.config == before.config
        largest = max(
            float((after.weight(path, layer) - before.weight(path, layer)).abs().max())
            for path in saved.paths
            for layer in range(4)
        )
    assert largest == facts["unmerge_max_difference"] <= 1e-6
    assert back["exact"] is (largest == 0)


def test_stored_frozen_tensors_are_used_whatever_the_generator_draws(finetuning, tmp_path, monkeypatch):
    model = adapted(finetuning, "vera", {"store_frozen": True})
    expected = logits(model)
    model.save_to(str(tmp_path / "adapter.nemo"))
    assert {"attention_qkv.A", "attention_qkv.B"} <= set(read(tmp_path / "adapter.nemo").tensors)
    draw = Init.draw
    monkeypatch.setattr(Init, "draw", lambda self, *args: draw(self, *args) + 1)  # as another torch might
    fresh, _ = finetuning(peft_scheme="none")
    fresh.load_adapters(str(tmp_path / "adapter.nemo"))
    assert torch.equal(logits(fresh), expected)
    fresh.setup_complete = True
    fresh.save_to(str(tmp_path / "again.nemo"))
    first, again = read(tmp_path / "adapter.nemo"), read(tmp_path / "again.nemo")
    assert first.settings == again.settings
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in first.tensors.items())
    plain = adapted(finetuning, "vera", {})
    plain.save_to(str(tmp_path / "plain.nemo"))
    assert "attention_qkv.A" not in read(tmp_path / "plain.nemo").tensors


def test_an_adapter_of_an_earlier_version_goes_on_by_its_own_rule(finetuning, tmp_path, capsys):
    """Its frozen factors, by torch's generator, had other last bits on another CPU; and so had its checkpoints'."""
    from nemo_tiedlora import console
    from nemo_tiedlora.nemo.resume import on_load_checkpoint

    model = adapted(finetuning, "vera", {"drawing_rule": 1})
    expected = logits(model)
    model.save_to(str(tmp_path / "new.nemo"))
    saved = read(tmp_path / "new.nemo")
    elsewhere = dict.fromkeys(saved.settings["checksums"], "0" * 64)
    settings = {name: value for name, value in saved.settings.items() if name != "drawing_rule"}
    write(replace(saved, settings=settings | {"checksums": elsewhere}), tmp_path / "old")
    console.note.cache_clear()
    fresh, _ = finetuning(peft_scheme="none")
    capsys.readouterr()
    fresh.load_adapters(str(tmp_path / "old"))
    assert capsys.readouterr().err.count("note: the frozen factors are drawn by rule 1") == 1
    assert torch.equal(logits(fresh), expected)
    fresh.setup_complete = True
    fresh.save_to(str(tmp_path / "again.nemo"))
    again = read(tmp_path / "again.nemo")
    assert (again.settings["drawing_rule"], again.settings["checksums"]) == (1, elsewhere)
    assert fresh.cfg.peft.vera_tuning.drawing_rule == 1

    now = adapted(finetuning, "vera", {})
    before = logits(now)
    assert not torch.equal(before, expected) and now.cfg.peft.vera_tuning.drawing_rule == 2
    with pytest.raises(UsageError, match="model.peft.vera_tuning.drawing_rule=2: .* set it to 1 to go on"):
        on_load_checkpoint(now, {"adapters": {"vera": {}}})  # looked at before anything else of it
    assert torch.equal(logits(now), before)


@pytest.fixture
def tied(finetuning, tmp_path):
    """A tied adapter's file, and the logits of its model."""
    model = adapted(finetuning, "tied_lora", {"target_modules": ["all"]})
    model.save_to(str(tmp_path / "tied.nemo"))
    return tmp_path / "tied.nemo", logits(model)


def test_a_folder_goes_wherever_a_file_goes(finetuning, files, tied, tmp_path):
    """Loading with a scheme's config, whose settings give way to the saved ones; text; the commands."""
    from typer.testing import CliRunner

    from nemo_tiedlora import cli

    file, expected = tied
    write(read(file), tmp_path / "folder")
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP

    for path in (file, tmp_path / "folder"):
        fresh, _ = finetuning(peft_scheme="none", tied_lora_tuning={"rank": 2})
        fresh.load_adapters(str(path), PEFT_CONFIG_MAP["tied_lora"](fresh.cfg))
        assert torch.equal(logits(fresh), expected)
        result = CliRunner().invoke(cli.app, ["inspect", str(path), "--json"], catch_exceptions=False)
        facts = json.loads(result.output)
        assert (facts["scheme"], facts["rank"], facts["base"]["hidden_size"]) == ("tied_lora", 4, 32)
    assert fresh.cfg.peft.tied_lora_tuning.rank == 4 and fresh.adapter_keys


def test_a_loaded_adapter_saves_the_same_tensors_again(finetuning, tied, tmp_path):
    file, _ = tied
    fresh, _ = finetuning(peft_scheme="none")
    fresh.load_adapters(str(file))
    fresh.setup_complete = True
    fresh.save_to(str(tmp_path / "again.nemo"))
    one, other = read(file), read(tmp_path / "again.nemo")
    assert (one.settings, one.base) == (other.settings, other.base)
    assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())


@pytest.mark.parametrize("problem", ["scheme", "shape", "damaged"])
def test_what_does_not_fit_changes_nothing(finetuning, tied, tmp_path, problem):
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP

    file, _ = tied
    fresh, _ = finetuning("gpt" if problem == "shape" else "llama", peft_scheme="none")
    before = logits(fresh)
    asked = None
    if problem == "scheme":
        asked = PEFT_CONFIG_MAP["vera"](fresh.cfg)
    if problem == "damaged":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(UsageError, match="tied.nemo"):
        fresh.load_adapters(str(file), asked)
    assert torch.equal(logits(fresh), before) and not hasattr(fresh, "adaptations")


def test_other_adapters_keep_nemos_own_format(finetuning, tmp_path):
    for scheme in ("lora", "lora,tied_lora", "tied_lora,vera"):
        model, _ = finetuning(peft_scheme=scheme, lora_tuning=toy.LORA)
        model.setup_complete = True
        model.save_to(str(tmp_path / "other.nemo"))
        with tarfile.open(tmp_path / "other.nemo") as archive:
            names = [name.removeprefix("./") for name in archive.getnames()]
        assert "model_weights.ckpt" in names and "adapter_config.json" not in names


def test_merging_into_another_base_takes_force(files, tied, tmp_path):
    file, _ = tied
    with pytest.raises(UsageError, match="gpt.nemo|num_query_groups"):
        merge(files["gpt"], file, tmp_path / "out.nemo")
    merge(files["llama"], file, tmp_path / "once.nemo")
    with pytest.raises(UsageError, match="not the base this adapter was trained on"):
        merge(tmp_path / "once.nemo", file, tmp_path / "out.nemo")
    assert not (tmp_path / "out.nemo").exists()
    facts = merge(tmp_path / "once.nemo", file, tmp_path / "twice.nemo", force=True)
    assert facts["base_checksum"] == "differs"
    with pytest.raises(UsageError, match="no adapter was merged"):
        unmerge(files["llama"], file, tmp_path / "out.nemo")
    unmerge(tmp_path / "twice.nemo", file, tmp_path / "back.nemo")
    unmerge(tmp_path / "back.nemo", file, tmp_path / "first.nemo")
    with open_base(files["llama"]) as before, open_base(tmp_path / "first.nemo") as after:
        assert after.config == before.config


def test_a_single_file_base_merges_alike(finetuning, files, tied, tmp_path):
    """The form that older NeMo versions saved: one state dict."""
    import io

    file, _ = tied
    model, _ = finetuning(peft_scheme="none")
    state = {f"model.{key}": value for key, value in model.model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with tarfile.open(files["llama"]) as source, tarfile.open(tmp_path / "single.nemo", "w") as single:
        for member in source:
            if member.isfile() and "model_weights" not in member.name:
                single.addfile(member, source.extractfile(member))
        member = tarfile.TarInfo("./model_weights.ckpt")
        member.size = len(buffer.getvalue())
        single.addfile(member, io.BytesIO(buffer.getvalue()))
    assert merge(tmp_path / "single.nemo", file, tmp_path / "one.nemo")["base_checksum"] == "matches"
    merge(files["llama"], file, tmp_path / "other.nemo")
    with open_base(tmp_path / "one.nemo") as one, open_base(tmp_path / "other.nemo") as other:
        for path in read(file).paths:
            for layer in range(4):
                assert torch.equal(one.weight(path, layer), other.weight(path, layer))
        assert set(one.state) == set(state)
        assert all(
            torch.equal(one.state[key], value) for key, value in state.items() if "norm" in key and value is not None
        )


@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_nemos_own_lora_is_converted(finetuning, files, tmp_path, layers):
    tuning = toy.LORA | {"target_modules": toy.ALL_TARGETS, "alpha": 4, "layer_selection": layers}
    model, trainer = finetuning(peft_scheme="lora", lora_tuning=tuning, trainer={"max_steps": 6})
    trainer.fit(model)
    model.setup_complete = True
    model.save_to(str(tmp_path / "old.nemo"))
    from typer.testing import CliRunner

    from nemo_tiedlora import cli

    arguments = ["convert", tmp_path / "old.nemo", "--out", tmp_path / "new", "--base", files["llama"], "--json"]
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert json.loads(result.output)["alpha"] == 4
    fresh, _ = finetuning(peft_scheme="none")
    fresh.load_adapters(str(tmp_path / "new"))
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-5)
    merge(files["llama"], tmp_path / "new", tmp_path / "merged.nemo")
    with pytest.raises(UsageError, match="tied.nemo|scheme tied_lora"):
        fresh.setup_complete = True
        fresh.save_to(str(tmp_path / "tied.nemo"))
        convert(tmp_path / "tied.nemo")


def test_the_newest_complete_last_checkpoint_is_kept(host, tmp_path):
    """A run named step=7, killed while it saved: that can leave two complete ones, or an incomplete one."""
    from nemo_tiedlora.nemo.resume import keep_one_last

    names = [f"step=7-step={step}-last.ckpt" for step in (5, 10, 100)]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "step=7-step=100-last-unfinished").touch()  # NeMo's marker
    (tmp_path / "step=7-step=100.ckpt").touch()
    keep_one_last(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step=7-step=10-last.ckpt", "step=7-step=100.ckpt"}
