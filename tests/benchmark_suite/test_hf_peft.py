"""Hugging Face PEFT's methods as variants: those that are shipped train, on a decoder and on an encoder."""

import hf_cells
import pytest
import torch

import benchmark_suite
from benchmark_suite.backends import backend
from benchmark_suite.variant_spec import VariantSpec

SHIPPED = [name for name in benchmark_suite.list_variants() if benchmark_suite.variant(name).is_peft]
SHORT = {"steps": 8, "batch_size": 4, "max_seq_length": 40, "warmup_steps": 0}


def test_shipped_variants_train_all_that_they_say(models, data_root, tmp_path):
    assert {"PEFT LoRA", "PEFT DoRA", "PEFT VeRA", "PEFT RandLoRA"} <= set(SHIPPED)
    for model, task in (("llama", "before-v1"), ("roberta", "mrpc-v1")):
        on = backend("hf", models(model))
        (used,) = hf_cells.sweeping.tasks_named([task], data_root, 8).values()
        rows = used.examples("train")
        recipe = hf_cells.replace(used.spec.recipe, **SHORT | {"val_interval": 4})
        head = 2 if model == "roberta" else None
        for name in SHIPPED:
            variant = benchmark_suite.variant(name)
            training = hf_cells.Training(
                variant, variant.ranks[0] if variant.ranks else None, rows, rows, recipe, 1e-2, 3, tmp_path, head
            )
            with on.trained(training, weights={}) as untrained:
                before = {name: tensor.clone() for name, tensor in untrained.trainable.items()}
            with on.trained(training) as trained:
                after, sizes = trained.trainable, trained.sizes
                assert all(not torch.equal(tensor, after[name]) for name, tensor in before.items()), name
                counted = sizes["trainable"] + sizes.get("head_parameters", 0)
                assert counted == sum(tensor.numel() for tensor in after.values())
                if head is None:
                    assert trained.facts.losses[-1][1] < trained.facts.losses[0][1], name


def test_results_of_shipped_variants(models, tmp_path):
    variants = ["PEFT LoRA", "PEFT DoRA", "PEFT VeRA"]
    found, cells = hf_cells.swept(models("llama"), tmp_path, variants, ["before-v1"], **SHORT)
    lora, dora, vera = found
    assert lora["percent_of_lora"] == 100 < dora["percent_of_lora"] and vera["percent_of_lora"] < 20
    assert "peft" in vera["versions"] and vera["error"] is None
    for result, cell in zip(found, cells, strict=True):
        assert (cell.folder(tmp_path) / "adapter" / "adapter_model.safetensors").is_file()
        assert result["adapter_bytes"] > 4 * result["trainable"]


def test_any_method_takes_its_own_settings_and_names_of_modules(models, tmp_path):
    own = VariantSpec(
        name="OFT here", description="Mine.", scheme="peft:oft",
        settings={"oft_block_size": 4, "target_modules": ["o_proj", "mlp_down"]},
    )  # fmt: skip
    own.check()
    (found,), (cell,) = hf_cells.swept(models("llama"), tmp_path, [own], ["before-v1"], **SHORT)
    assert found["error"] is None and found["rank"] is None and found["settings"]["oft_block_size"] == 4
    kept = (cell.folder(tmp_path) / "adapter" / "adapter_config.json").read_text()
    assert '"o_proj"' in kept and "mlp.down_proj" in kept and "q_proj" not in kept


def test_what_peft_refuses_when_it_is_put_on_fails_its_cell_only(models, tmp_path):
    bad = VariantSpec(name="C3A", description="Mine.", scheme="peft:c3a", settings={"block_size": 7})
    (failed, fine), _ = hf_cells.swept(models("llama"), tmp_path, [bad, "TL6"], ["before-v1"], **SHORT)
    assert failed["status"] == "failed" and "block size" in failed["error"] and fine["status"] == "done"


@pytest.mark.thorough
def test_methods_that_are_not_refused_train(models, data_root, tmp_path):
    """All that PEFT has and whose defaults fit so small a model."""
    from benchmark_suite.backends.hf import peft_methods

    too_large = {"c3a", "fourierft", "road", "vblora", "waveft"}
    names = [name for name, config in peft_methods.known().items()
             if name not in {*peft_methods.REFUSED, *too_large} and not peft_methods.is_prompt(config)]  # fmt: skip
    ranks = {name: [4] for name in ("miss", "psoft", "shira")}  # theirs are too large as well
    variants = [
        VariantSpec(name=name, description=name, scheme=f"peft:{name}", ranks=ranks.get(name, [])) for name in names
    ]
    assert len(variants) > 20
    for model, task in (("llama", "before-v1"), ("roberta", "stsb-v1")):
        found, _ = hf_cells.swept(models(model), tmp_path, variants, [task], data_root, **SHORT)
        assert {result["variant"]: result["error"] for result in found if result["error"]} == {}
        assert all(result["validation_losses"][0] != result["validation_losses"][-1] for result in found)
