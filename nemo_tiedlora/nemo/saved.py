"""Adapters of a NeMo model as canonical files: gathered from all ranks when saved, cut for each when loaded."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
from nemo.utils import logging
from omegaconf import OmegaConf, open_dict

from nemo_tiedlora.checkpoint import Adapter, Base, is_canonical, read, write
from nemo_tiedlora.checkpoint.adapter import settings_of
from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.checkpoint.legacy import open_adapter
from nemo_tiedlora.checkpoint.pickles import as_it_is, is_trusted
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.config import check_shape
from nemo_tiedlora.model.data import dump
from nemo_tiedlora.model.targets import blocks, where
from nemo_tiedlora.nemo.adaptations import Adaptations
from nemo_tiedlora.nemo.peft_config import FactorPEFTConfig
from nemo_tiedlora.parallel.cut import cut, has_parts, join, tensor_ranks

#: The settings of ``model.data.train_ds`` that NeMo's generation script takes from an adapter's config.
PROMPTS = ("prompt_template", "label_key", "truncation_field", "add_bos", "add_eos", "add_sep")


def gather(model: NLPAdapterModelMixin, scheme: str | None = None, frozen: bool = False) -> Adapter:
    """The model's adapter, whole. All ranks must call it together, and each gets the same.

    Args:
        scheme: which one, if the model has several.
        frozen: also bring the frozen tensors, which are otherwise drawn again from the seed.
    """
    scheme = scheme or next(iter(model.adaptations))
    bank = model.adaptations[scheme].bank
    found = whole(model, scheme, {key: {"": tensor} for key, tensor in bank.kept(drawn=frozen).items()})
    stages = _all(bank.checksums, parallel_state.get_pipeline_model_parallel_group())
    checksums = {key: checksum for known in stages for key, checksum in known.items()}
    specs = model.adaptations[scheme].specs
    settings = settings_of(
        bank.variant.config, bank.variant, {key: checksums[key] for key in specs if key in checksums}
    )
    tensors = {key: found[key][""] for key in specs if key in found}
    return Adapter(scheme, settings, Base.of(model.cfg), tensors)


def whole(model: NLPAdapterModelMixin, scheme: str, values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What all ranks together have, on the CPU. All ranks must call it together, and each gets the same.

    Args:
        values: by the key of a tensor of this rank, and by any name: something of that tensor's shape, which is joined,
            or anything else, of which one rank's is taken.
    """
    mine = {key: {name: _on_cpu(value) for name, value in named.items()} for key, named in values.items()}
    by_tensor_rank = _all(mine, parallel_state.get_tensor_model_parallel_group())
    specs = model.adaptations[scheme].specs
    stage: dict[str, dict[str, Any]] = {}
    for key, named in mine.items():
        spec, site = specs[key]
        layout = where(site.target).parallel, blocks(site.target, model.cfg)
        stage[key] = {
            name: join([values[key][name] for values in by_tensor_rank], spec, *layout) if has_parts(value) else value
            for name, value in named.items()
        }
    stages = _all(stage, parallel_state.get_pipeline_model_parallel_group())
    return {key: named for one in reversed(stages) for key, named in one.items()}


def part(model: NLPAdapterModelMixin, scheme: str, key: str, value: Any) -> Any:
    """What this rank holds of one of ``whole``'s values."""
    if not has_parts(value):
        return value
    spec, site = model.adaptations[scheme].specs[key]
    return cut(value, spec, where(site.target).parallel, blocks(site.target, model.cfg), *tensor_ranks())


def only_ours(model: NLPAdapterModelMixin) -> bool:
    """Whether the model is a base with adapters of ours, and trains nothing else on this stage."""
    adaptations = Adaptations.of(model)
    if not adaptations or not model.setup_complete:
        return False
    ours = {id(tensor) for adapted in adaptations.values() for tensor in adapted.bank.named_tensors().values()}
    chunks = model._unwrap_model_list()
    named = [item for chunk in chunks for item in chunk.named_parameters(prefix="model")]
    keys = {_bare(name) for name in model.adapter_keys | model.tunable_base_param_keys}
    return all(id(tensor) in ours for name, tensor in named if _bare(name) in keys)


def _bare(name: str) -> str:
    """A parameter's name without the wrappers around the model."""
    return name.replace("module.", "")


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def load(model: NLPAdapterModelMixin, adapter: Adapter) -> None:
    """Copy this rank's part of every tensor of ``adapter`` into the model, which has been given its scheme.

    Raises:
        UsageError: a tensor that does not fit; then nothing was changed.
    """
    mine, bank = [], model.adaptations[adapter.scheme].bank
    for key, tensor in bank.named_tensors().items():
        if key not in adapter.specs:
            raise UsageError("adapter", adapter.scheme, f"the model has a tensor {key}, which the adapter has not")
        if key in adapter.tensors:
            value = part(model, adapter.scheme, key, adapter.tensors[key])
            if value.shape != tensor.shape:
                shapes = f"{tuple(value.shape)} instead of {tuple(tensor.shape)}"
                raise UsageError("adapter", adapter.scheme, f"the tensor {key} has shape {shapes} on this rank")
            mine.append((tensor, value))
    with torch.no_grad():
        for tensor, value in mine:
            tensor.copy_(value)
    recorded = adapter.config.checksums or {}  # of what is in the model now, which a stored tensor need not equal
    bank.checksums.update({key: recorded[key] for key in bank.checksums.keys() & recorded.keys()})


def load_adapters(self, stock, filepath, peft_cfgs=None, map_location=None):
    """NeMo's ``load_adapters``, for files in the canonical form too, and without unpickling others. What a canonical
    file says of its method goes before ``peft_cfgs``: it decides the tensors.

    Raises:
        UsageError: a file that is damaged, could run code or does not fit the model; then nothing was changed.
    """
    if is_trusted(filepath):
        with as_it_is(filepath):
            return stock(self, str(filepath), peft_cfgs, map_location)
    if not is_canonical(filepath, "model.peft.restore_from_path"):
        return _load_nemos_own(self, Path(filepath), peft_cfgs)
    adapter = read(filepath, "model.peft.restore_from_path")
    check_shape(adapter.shape, self.cfg, "model.peft.restore_from_path", filepath)
    asked = peft_cfgs if isinstance(peft_cfgs, list) else [peft_cfgs] if peft_cfgs else []
    if asked and [getattr(one, "scheme", None) for one in asked] != [adapter.scheme]:
        way_out = f"an adapter of scheme {adapter.scheme}; set model.peft.peft_scheme={adapter.scheme}"
        raise UsageError("model.peft.restore_from_path", str(filepath), way_out)
    with open_dict(self.cfg):
        self.cfg.peft = OmegaConf.merge(self.cfg.get("peft") or {}, adapter.peft)
        self.cfg.peft[f"{adapter.scheme}_tuning"] = adapter.settings
    self.add_adapter([FactorPEFTConfig(adapter.scheme, self.cfg, adapter.config, stored=adapter.tensors)])
    load(self, adapter)


def _load_nemos_own(self, path: Path, peft_cfgs) -> None:
    saved, states = open_adapter(path, "model.peft.restore_from_path")
    check_shape(saved, self.cfg, "model.peft.restore_from_path", path)
    ranks = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    if ranks not in states or len(states) != parallel_state.get_model_parallel_group().size():
        way_out = f"saved by {len(states)} tensor and pipeline ranks; NeMo loads it under that layout only"
        raise UsageError("model.peft.restore_from_path", str(path), way_out)
    state = states[ranks]
    if getattr(self, "megatron_amp_O2", False):
        state = {key.replace("model.", "model.module.", 1): tensor for key, tensor in state.items()}
    config = OmegaConf.create(dict(saved))
    self.add_adapter(peft_cfgs or [PEFT_CONFIG_MAP[name](config) for name in config.peft.peft_scheme.split(",")])
    mine = self.state_dict()
    wanted = {} if self.ptuning_only_and_non_first_stage else self.adapter_keys | self.tunable_base_param_keys
    for key in sorted(state.keys() ^ wanted if wanted else ()):
        way_out = f"the tensor {key} is {'missing' if key in wanted else 'not one of its method'}"
        raise UsageError("model.peft.restore_from_path", str(path), way_out)
    for key, tensor in state.items():
        if key in mine and mine[key].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(mine[key].shape)}"
            raise UsageError("model.peft.restore_from_path", str(path), f"the tensor {key} has shape {shapes}")
    super(NLPAdapterModelMixin, self).load_state_dict(state, strict=False)


def save_to(self, stock, model, save_path):
    """NeMo's saving of a model: of one that is a base with an adapter of ours and nothing else, the adapter, in the
    canonical form and in one file, whatever the layout."""
    if not only_ours(model) or len(model.adaptations) != 1:
        return stock(self, model, save_path)
    (adapted,) = model.adaptations.values()
    adapter = gather(model, frozen=adapted.bank.variant.config.store_frozen)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        base = Base.of(model.cfg, _base_checksums(model.cfg.get("restore_from_path"), tuple(adapter.paths)))
        write(replace(adapter, base=base, model_config=_config(model, adapter)), save_path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _config(model: NLPAdapterModelMixin, adapter: Adapter) -> str:
    """The model's config as YAML, without what the adapter does not depend on: layout, data and optimizer of the run,
    and where the base's tokenizer was unpacked. What NeMo's generation script wants of it stays: how rows become
    prompts, and that an optimizer has a name."""
    config = OmegaConf.to_container(model.cfg, enum_to_str=True)
    rows = (config.get("data") or {}).get("train_ds") or {}
    prompts = {name: rows[name] for name in PROMPTS if name in rows}
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        config[name] = 1
    config.update(virtual_pipeline_model_parallel_size=None, sequence_parallel=False, peft=adapter.peft)
    config.update(data={"train_ds": prompts} if prompts else {}, optim={"name": None})
    tokenizer = config["tokenizer"].items()
    config["tokenizer"] = {name: Path(value).name if isinstance(value, str) else value for name, value in tokenizer}
    return dump(config, sort_keys=True)


@cache
def _base_checksums(path: str | None, paths: tuple[str, ...]) -> dict[str, str]:
    """Once per process and base: the file is read through. Nothing if it is gone."""
    if not path or not Path(path).is_file():
        return {}
    try:
        with open_base(Path(path)) as base:
            return base.checksums(list(paths))
    except UsageError as error:  # better an adapter that does not know its base than none
        logging.warning(f"the adapter is saved without the checksum of its base: {error}")
        return {}


def _all(value, group) -> list:
    """``value`` of every rank of a process group, in order."""
    ranks = torch.distributed.get_world_size(group)
    if ranks == 1:
        return [value]
    values = [None] * ranks
    torch.distributed.all_gather_object(values, value, group=group)
    return values
