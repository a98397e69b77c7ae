"""The schemes as NeMo PEFT configs."""

from collections.abc import Collection

import torch
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
from nemo.collections.nlp.parts.peft_config import PEFTConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_tiedlora.checkpoint.adapter import specs_of
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.sizes import sites
from nemo_tiedlora.model.targets import Target, blocks, kinds, rows, where
from nemo_tiedlora.nemo.adaptations import Adaptation, Adaptations
from nemo_tiedlora.nemo.adapter import FactorAdapter, adapter_config
from nemo_tiedlora.nemo.mixins import mixin
from nemo_tiedlora.parallel.cut import cut, tensor_ranks
from nemo_tiedlora.parallel.exchange import agreed
from nemo_tiedlora.parallel.scores import Ranks
from nemo_tiedlora.parallel.synchronise import Synchroniser, partial
from nemo_tiedlora.variants import Bank, Site, Variant, VariantConfig, build, config_for


class FactorPEFTConfig(PEFTConfig):
    """A scheme's settings, read from ``cfg.peft.<scheme>_tuning``, as NeMo's ``add_adapter`` wants them.

    Args:
        config: the settings, where they have been parsed already.
        stored: keys of tensors that will be loaded from an adapter's file.

    Raises:
        UsageError: a setting that the scheme refuses, targets that the model does not have, or a layout that the scheme
            does not support.
    """

    def __init__(self, scheme: str, cfg: DictConfig, config: VariantConfig | None = None, stored: Collection[str] = ()):
        self.scheme, self.stored = scheme, stored
        section = cfg.peft.get(f"{scheme}_tuning") or {}
        self.settings = OmegaConf.to_container(section, resolve=True) if section else {}
        self.config = config or config_for(scheme, self.settings)
        self.kinds = kinds(self.config.target_modules, cfg)
        self.variant = build(self.config, cfg.num_layers)
        _check_optimizer(cfg, self.variant)
        adapters, self.name_key_to_mcore_mixins = {}, {}
        for kind in self.kinds:
            target = where(kind)
            _check_spread(target, cfg)
            adapters[self.adapter_name(kind)] = adapter_config(scheme)(
                kind, target.parallel, self.config.dropout, self.settings
            )
            linear = mixin(target, bool(cfg.get("transformer_engine")))
            self.name_key_to_mcore_mixins[self.adapter_name(kind)] = [(target.path, linear)]
        super().__init__({"layer_selection": self.config.layer_selection}, adapters)
        self.weight_tying = True  # makes NeMo call tie_weights once all layers have their adapters

    def adapter_name(self, kind: str) -> str:
        return f"{self.scheme}_{kind}"

    def tie_weights(self, model: NLPAdapterModelMixin) -> None:
        """Bind every layer's adapter to one bank, and record in the model's config what makes it again."""
        ranks, rank = tensor_ranks()
        modules = sites(self.config, model.cfg)
        self.variant.start(modules)
        bank = Bank(
            self.variant,
            cut=lambda whole, spec, site: cut(
                whole, spec, where(site.target).parallel, blocks(site.target, model.cfg), ranks, rank
            ),
            checksums=None if self.config.store_frozen else self.config.checksums,  # loaded after being drawn
            agreed=agreed,
            stored=self.stored,
        )
        by_place = {(site.target, site.layer): site for site in modules}
        partials: set[str] = set()
        bound: list[FactorAdapter] = []
        for layer in model._unwrap_layers_model_list():
            for kind in self.kinds:
                linear = layer.get_submodule(where(kind).path)
                adapters = getattr(linear, "adapter_layer", {})
                if self.adapter_name(kind) in adapters:
                    adapter = adapters[self.adapter_name(kind)]
                    site = by_place[kind, layer.layer_number - 1]
                    stacked = blocks(kind, model.cfg)
                    adapter.bind(bank, site, linear, rows(kind, model.cfg, ranks), stacked)
                    specs = self.variant.tensors(site).values()
                    partials |= {s.key for s in specs if partial(s, adapter.parallel, adapter.sequence_parallel)}
                    bound.append(adapter)
        for adapter in bound:
            adapter.share_gradients_of(partials)
        trained = {key: tensor for key, (_, tensor) in bank.trained().items()}
        synchroniser = Synchroniser({key: tensor.numel() for key, tensor in trained.items()}, partials)
        for key in synchroniser.counted_elsewhere:
            trained[key].shared = True  # Megatron's name for it
        model.adaptations = Adaptations.of(model)
        ranks_of = _ranks(self.variant, modules, model.cfg)
        model.adaptations[self.scheme] = Adaptation(bank, synchroniser, ranks_of, specs_of(self.variant, modules))
        model.adapter_keys = model._get_all_keys() - model.base_keys
        with open_dict(model.cfg):
            record = {"checksums": bank.checksums, "drawing_rule": self.config.drawing_rule, **self.variant.decided()}
            OmegaConf.update(model.cfg, f"peft.{self.scheme}_tuning", record, force_add=True)


def _ranks(variant: Variant, modules: list[Site], cfg: DictConfig) -> Ranks | None:
    """How a variant's scores are added up over ranks; None if it has none."""
    if not variant.parts:
        return None
    column = torch.tensor([where(module.target).parallel == "column" for module in modules])
    split = {"output": column | bool(cfg.get("sequence_parallel")), "A": ~column, "B": column}
    return Ranks(torch.stack([split[part] for part in variant.parts]).double())


def _check_spread(target: Target, cfg: DictConfig) -> None:
    """Refuse a layer inside an expert where experts are spread over ranks: each rank would have others of them."""
    spread = cfg.get("expert_model_parallel_size") or 1
    if target.expert is not None and spread > 1:
        way_out = "adapters go into experts that every rank has; set it to 1, or use targets in the attention"
        raise UsageError("model.expert_model_parallel_size", spread, way_out)


def _check_optimizer(cfg: DictConfig, variant: Variant) -> None:
    """Refuse settings that the optimizer or the layout would not follow."""
    name, config = (cfg.get("optim") or {}).get("name"), variant.config
    if name == "mcore_distributed_optim":
        if variant.changes_with_step:
            raise UsageError("model.optim.name", name, "it would move inactive modules; use adamw or fused_adam")
        if config.lr_ratio != 1:
            raise UsageError("lr_ratio", config.lr_ratio, f"{name} has one learning rate; use adamw or fused_adam")
        stages = cfg.get("pipeline_model_parallel_size", 1)
        depth = max(1, cfg.num_layers // stages)
        adapted = {layer // depth for layer in config.adapted_layers(cfg.num_layers)}
        if len(adapted) < stages:
            way_out = f"a pipeline stage would train nothing, which {name} cannot; use adamw or fused_adam"
            raise UsageError("layer_selection", config.layer_selection, way_out)
        overlapped = cfg.optim.get("overlap_grad_sync")
        ranks = cfg.get("tensor_model_parallel_size", 1) * stages
        if overlapped and ranks > 1:
            way_out = "would begin before gradients are whole over tensor and pipeline ranks; set it to false"
            raise UsageError("model.optim.overlap_grad_sync", overlapped, way_out)
    if cfg.get("sequence_parallel") and set(variant.parts) - {"output"}:
        way_out = "needs whole gradients of every micro-batch, and sequence parallelism has parts of them; use forward"
        raise UsageError("importance", "backward", way_out)
