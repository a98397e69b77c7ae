"""What ``register`` changes in NeMo: each change has its reason, is needed, helps, and is taken back.

A probe that passes without its change means that this NeMo no longer needs it: delete the change.
"""

import inspect
import json
from unittest import mock

import pytest
import toy

import nemo_tiedlora
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.platform.patch import Restore

PROBES = {}


def probe(function):
    PROBES[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def hooks(host):
    """The changes, with none of them in force."""
    from nemo_tiedlora.nemo import hooks

    nemo_tiedlora.unregister()
    yield hooks
    nemo_tiedlora.register()


@pytest.fixture(scope="module")
def trained(hooks, files, tmp_path_factory):
    """A model with an adapter after a step of training, and its trainer."""
    folder = tmp_path_factory.mktemp("trained")
    nemo_tiedlora.register()
    peft = {"peft_scheme": "tied_lora", "tied_lora_tuning": {"rank": 4, "lr_ratio": 2}}
    config = toy.finetuning_config(files["llama"], files["train"], files["validation"], peft)
    for split in ("train_ds", "validation_ds"):
        config.model.data[split].index_mapping_dir = str(folder)
    config.model.data.validation_ds.metric.name = "loss"
    trainer = toy.trainer(config.model, num_sanity_val_steps=0, val_check_interval=1, max_steps=1, precision=32)
    config.trainer.precision = 32
    model = toy.finetuning_model(config, trainer)
    trainer.fit(model)
    nemo_tiedlora.unregister()
    return model, trainer


@probe
def schemes(trained, **_):
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP

    model, _ = trained
    assert PEFT_CONFIG_MAP["cond_lora"](model.cfg).scheme == "cond_lora"
    assert PEFT_CONFIG_MAP["parallel_adapter"]


@probe
def adapted_layers(**_):
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from nemo.core.classes.mixins.adapter_mixins import get_registered_adapter

    assert issubclass(get_registered_adapter(ColumnParallelLinear).adapter_class, ColumnParallelLinear)


def rows(trained, tmp_path, kind, row, **settings):
    """A fine-tuning dataset as NeMo's model makes it, of one row."""
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_sft_model

    model, _ = trained
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    settings = {"memmap_workers": 1, "index_mapping_dir": str(tmp_path)} | settings
    return getattr(megatron_gpt_sft_model, kind)(str(file), model.tokenizer, **settings)


@probe
def chat_rows(trained, tmp_path, **_):
    row = {"messages": [{"role": role, "content": "5 6"} for role in ("user", "assistant")]}
    assert rows(trained, tmp_path, "GPTSFTChatDataset", row, max_seq_length=64)[0]["mask"].any()


@probe
def template_rows(trained, tmp_path, **_):
    settings = {"prompt_template": "{input} {output}", "label_key": "output", "truncation_field": "output"}
    try:
        rows(trained, tmp_path, "GPTSFTDataset", {"input": "1 " * 64, "output": "2"}, max_seq_length=16, **settings)[0]
    except UsageError as error:
        assert "no room" in str(error)
    else:
        raise AssertionError("a row of which nothing is learned was taken")


@probe
def tied_factors(trained, **_):
    from nemo_tiedlora.nemo.peft_config import FactorPEFTConfig

    model, _ = trained
    config = FactorPEFTConfig("vera", model.cfg)
    with mock.patch.object(config, "tie_weights") as tied:
        model.tie_weights(config)
    tied.assert_called_once_with(model)


@probe
def optimizer_groups(trained, **_):
    model, _ = trained
    model.setup_optimizer_param_groups()
    groups = {group["lr_ratio"]: {key[-1] for key in group["keys"]} for group in model._optimizer_param_groups}
    assert groups == {1: {"A", "u"}, 2: {"B", "v"}}


@probe
def training_contract(trained, **_):
    model, _ = trained
    assert model.adaptations.callback in model.configure_callbacks()


@probe
def adapter_files(trained, tmp_path, finetuning, **_):
    from nemo_tiedlora.checkpoint import is_canonical

    model, _ = trained
    model.setup_complete = True  # as NeMo says of a model that it has prepared
    model.save_to(str(tmp_path / "adapter.nemo"))
    assert is_canonical(tmp_path / "adapter.nemo", "")
    plain, _ = finetuning(peft_scheme="none")
    plain.load_adapters(str(tmp_path / "adapter.nemo"))
    assert plain.adaptations.keys() == {"tied_lora"}


@probe
def whole_checkpoints(trained, tmp_path, **_):
    _, trainer = trained
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = trainer.strategy.load_checkpoint(tmp_path / "run.ckpt")
    assert "exp_avg" in saved["adapters"]["tied_lora"]["attention_qkv.A"]
    trainer.strategy.remove_checkpoint(tmp_path / "run.ckpt")
    assert not (tmp_path / "run.ckpt").exists()


def test_every_change_has_a_probe(hooks):
    assert list(PROBES) == [patch.name for patch in hooks.PATCHES]


@pytest.mark.parametrize("name", PROBES)
def test_a_change_is_needed_and_helps(hooks, trained, finetuning, tmp_path, name):
    resources = {"trained": trained, "finetuning": finetuning}
    folders = [tmp_path / number for number in ("without", "with")]
    for folder in folders:
        folder.mkdir()
    with Restore() as restore, pytest.raises(Exception):  # noqa: B017, as it comes
        for patch in hooks.PATCHES:
            if patch.name != name:
                patch.apply(restore)
        PROBES[name](tmp_path=folders[0], **resources)
    with Restore() as restore:
        for patch in hooks.PATCHES:
            patch.apply(restore)
        PROBES[name](tmp_path=folders[1], **resources)


#: The stock methods as they must be called, and those that NeMo must leave to Lightning.
SHAPES = {
    "NLPAdapterModelMixin.tie_weights": ["self", "peft_cfg"],
    "NLPAdapterModelMixin.setup_optimizer_param_groups": ["self"],
    "NLPAdapterModelMixin.configure_callbacks": None,
    "NLPAdapterModelMixin.load_adapters": ["self", "filepath", "peft_cfgs", "map_location"],
    "NLPAdapterModelMixin.on_save_checkpoint": None,
    "NLPAdapterModelMixin.on_load_checkpoint": ["self", "checkpoint"],
    "NLPSaveRestoreConnector.save_to": ["self", "model", "save_path"],
    "NLPDDPStrategy.save_checkpoint": ["self", "checkpoint", "filepath", "storage_options"],
    "NLPDDPStrategy.load_checkpoint": ["self", "checkpoint_path", "load_optimizer_states"],
    "NLPDDPStrategy.remove_checkpoint": ["self", "filepath"],
}


def test_what_is_replaced_has_the_shape_that_is_counted_on(hooks):
    replaced = set()

    class Recording(Restore):
        def set(self, owner, name, value):
            assert f"``{name}``" in patch.reason
            if inspect.isclass(owner):
                replaced.add(f"{owner.__name__}.{name}")
            super().set(owner, name, value)

    with Recording() as restore:
        for patch in hooks.PATCHES:
            patch.apply(restore)
    assert replaced == set(SHAPES)
    for path, expected in SHAPES.items():
        owner, name = path.split(".")
        stock = vars(getattr(hooks, owner)).get(name)
        assert (stock and list(inspect.signature(stock).parameters)) == expected, path


def everything(hooks):
    """Every attribute of every class and module that is touched, and what NeMo's tables hold."""
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_sft_model as sft

    owners = {sft, *sft.MegatronGPTSFTModel.__mro__, *hooks.NLPDDPStrategy.__mro__}
    owners |= set(hooks.NLPSaveRestoreConnector.__mro__)
    for adapted in (*hooks.LOCAL.values(), *hooks.TRANSFORMER_ENGINE.values()):
        owners |= set(adapted.__mro__)
    found = {(owner, name): value for owner in owners for name, value in vars(owner).items()}
    for table in (hooks.PEFT_CONFIG_MAP, hooks.ADAPTER_REGISTRY):
        found |= {(id(table), key): value for key, value in table.items()}
    return found


def identical(one, other):
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)


def test_registering_says_what_it_changes_and_unregistering_gives_the_very_objects_back(hooks):
    stock = everything(hooks)
    changes = nemo_tiedlora.register()
    inside = everything(hooks)
    assert not identical(inside, stock)
    assert [change.name for change in changes] == list(PROBES)
    assert all(len(change.reason) > 40 and str(change).startswith(f"{change.name}: ") for change in changes)
    assert nemo_tiedlora.register() == changes and identical(everything(hooks), inside)
    for _ in range(2):
        nemo_tiedlora.unregister()
        assert identical(everything(hooks), stock)
    nemo_tiedlora.register()
    nemo_tiedlora.unregister()
    assert identical(everything(hooks), stock)


def test_what_another_has_entered_already_stays(hooks):
    stock = hooks.PEFT_CONFIG_MAP["lora"]
    with mock.patch.dict(hooks.PEFT_CONFIG_MAP, {"vera": stock}):
        nemo_tiedlora.register()
        assert hooks.PEFT_CONFIG_MAP["vera"] is stock
        nemo_tiedlora.unregister()
        assert hooks.PEFT_CONFIG_MAP["vera"] is stock and "tied_lora" not in hooks.PEFT_CONFIG_MAP


def test_nothing_is_left_of_a_registration_that_fails(hooks):
    stock = everything(hooks)
    broken = mock.Mock(apply=mock.Mock(side_effect=AttributeError("no such method")))
    with mock.patch.object(hooks, "PATCHES", (*hooks.PATCHES, broken)), pytest.raises(AttributeError, match="no such"):
        nemo_tiedlora.register()
    assert identical(everything(hooks), stock)
