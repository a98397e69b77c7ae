"""Two gloo processes, in tensor or pipeline parallel: adapter files, NeMo's per-rank files converted, sharded bases."""

import json
from pathlib import Path

import forked
import pytest
import torch
import toy

LAYOUTS = {"tensor": {"tensor_model_parallel_size": 2}, "pipeline": {"pipeline_model_parallel_size": 2}}
SCHEMES = {
    "tied_lora": {"preset": "TL6", "rank": 4, "target_modules": ["all"]},
    "share_lora": {"groups": [[1, 2]], "rank": 4, "target_modules": ["attention_v", "mlp_gate", "mlp_fc2"]},
    "cond_lora": {"rank": 4, "dora": True, "target_modules": ["attention_qkv", "attention_dense", "mlp_fc1"]},
}


def config_of(files, peft, scratch, layout=None):
    paths = (Path(files[name]) for name in ("llama", "train", "validation"))
    config = toy.finetuning_config(*paths, peft, **(layout or {}))
    for split in ("train_ds", "validation_ds"):
        config.model.data[split].index_mapping_dir = str(scratch)
    config.model.data.validation_ds.metric.name = "loss"
    return config


def built(config):
    trainer = toy.trainer(config.model, max_steps=4, val_check_interval=4, num_sanity_val_steps=0)
    return toy.finetuning_model(config, trainer), trainer


def loss_of(config, adapter):
    model, trainer = built(config)
    model.load_adapters(str(adapter))
    return trainer.validate(model, verbose=False)[0]["validation_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_write_what_one_reads(files, tmp_path, layout):
    from nemo_tiedlora.checkpoint import read, write
    from nemo_tiedlora.checkpoint.base import open_base
    from nemo_tiedlora.checkpoint.legacy import convert
    from nemo_tiedlora.checkpoint.merge import merge

    config = config_of(files, {"peft_scheme": "none"}, tmp_path)
    losses = {}
    for scheme, settings in SCHEMES.items():
        peft = {"peft_scheme": scheme, f"{scheme}_tuning": settings}
        model, _ = built(config_of(files, peft, tmp_path))
        torch.manual_seed(0)
        for _, parameter in model.adaptations[scheme].bank.trained().values():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.setup_complete = True
        model.save_to(str(tmp_path / f"{scheme}.nemo"))
        losses[scheme] = loss_of(config, tmp_path / f"{scheme}.nemo")

    forked.ranks(2, worker, tmp_path, files, LAYOUTS[layout])
    found = json.loads((tmp_path / "found.json").read_text())

    for scheme in SCHEMES:
        one, other = read(tmp_path / f"{scheme}.nemo"), read(tmp_path / f"{scheme}-again.nemo")
        assert (one.settings, one.base) == (other.settings, other.base)
        assert set(one.tensors) == set(other.tensors)
        assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())
        assert found[scheme] == pytest.approx(losses[scheme], abs=2e-4)

    write(convert(tmp_path / "old.nemo"), tmp_path / "converted")
    assert loss_of(config, tmp_path / "converted") == pytest.approx(found["lora"], abs=2e-4)

    with open_base(tmp_path / "base.nemo") as sharded, open_base(Path(files["llama"])) as whole:
        paths = read(tmp_path / "tied_lora.nemo").paths
        assert sharded.checksums(paths) == whole.checksums(paths)
    for base, out in ((tmp_path / "base.nemo", "a.nemo"), (files["llama"], "b.nemo")):
        merge(Path(base), tmp_path / "tied_lora.nemo", tmp_path / out)
    with open_base(tmp_path / "a.nemo") as one, open_base(tmp_path / "b.nemo") as other:
        assert one.checksums(paths) == other.checksums(paths)


def worker(folder: Path, files: dict[str, Path], layout: dict[str, int]) -> None:
    from nemo_tiedlora import platform, register

    with platform.host():
        register()
        config = config_of(files, {"peft_scheme": "none"}, folder, layout)
        model, _ = built(config)
        model.save_to(str(folder / "base.nemo"))
        found = {}
        for scheme in SCHEMES:
            model, trainer = built(config)
            model.load_adapters(str(folder / f"{scheme}.nemo"))
            found[scheme] = trainer.validate(model, verbose=False)[0]["validation_loss"]
            model.setup_complete = True
            model.save_to(str(folder / f"{scheme}-again.nemo"))
        peft = {"peft_scheme": "lora", "lora_tuning": toy.LORA | {"target_modules": toy.ALL_TARGETS, "alpha": 4}}
        model, trainer = built(config_of(files, peft, folder, layout))
        trainer.fit(model)
        found["lora"] = trainer.validate(model, verbose=False)[0]["validation_loss"]
        model.save_to(str(folder / "old.nemo"))
        if torch.distributed.get_rank() == 0:
            (folder / "found.json").write_text(json.dumps(found))
