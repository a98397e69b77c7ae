"""The schemes as NeMo PEFT configs."""

from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
from nemo.collections.nlp.parts.peft_config import PEFTConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.nemo.adapter import adapter_config
from nemo_tiedlora.nemo.mixins import LOCAL, TRANSFORMER_ENGINE
from nemo_tiedlora.nemo.sizes import sites
from nemo_tiedlora.nemo.targets import TARGETS, expand, is_gated, rows, shape
from nemo_tiedlora.parallel.cut import SHARDED_AXIS, cut
from nemo_tiedlora.variants import Bank, DynamicConfig, Site, VariantConfig, build, config_for


class FactorPEFTConfig(PEFTConfig):
    """A scheme's settings, read from ``cfg.peft.<scheme>_tuning``, as NeMo's ``add_adapter`` wants them.

    Raises:
        UsageError: a setting that the scheme refuses, or a layout that it does not support.
    """

    def __init__(self, scheme: str, cfg: DictConfig):
        self.scheme = scheme
        section = cfg.peft.get(f"{scheme}_tuning") or {}
        self.settings = OmegaConf.to_container(section, resolve=True) if section else {}
        self.config = config_for(scheme, self.settings)
        self.targets = expand(self.config.target_modules)
        _check_layout(cfg, scheme, self.targets)
        _check_optimizer(cfg, self.config)
        self.variant = build(self.config, cfg.num_layers)
        mixins = TRANSFORMER_ENGINE if cfg.get("transformer_engine") and TRANSFORMER_ENGINE else LOCAL
        adapters, self.name_key_to_mcore_mixins = {}, {}
        for target in self.targets:
            where = TARGETS[target]
            adapters[self.adapter_name(target)] = adapter_config(scheme)(
                target, where.parallel, self.config.dropout, self.settings
            )
            self.name_key_to_mcore_mixins[self.adapter_name(target)] = [(where.path, mixins[where.parallel])]
        super().__init__({"layer_selection": self.config.layer_selection}, adapters)
        self.weight_tying = True  # makes NeMo call tie_weights once all layers have their adapters

    def adapter_name(self, target: str) -> str:
        return f"{self.scheme}_{target}"

    def tie_weights(self, model: NLPAdapterModelMixin) -> None:
        """Bind every layer's adapter to one bank, and record in the model's config what makes it again."""
        bank = Bank(
            self.variant,
            cut=lambda whole, spec, site: cut(whole, spec, SHARDED_AXIS[TARGETS[site.target].parallel]),
            checksums=self.config.checksums,
        )
        ranks = model.cfg.get("tensor_model_parallel_size", 1)
        for layer in model._unwrap_layers_model_list():
            for target in self.targets:
                linear = layer.get_submodule(TARGETS[target].path)
                adapters = getattr(linear, "adapter_layer", {})
                if self.adapter_name(target) in adapters:
                    site = Site(target, layer.layer_number - 1, *shape(target, model.cfg))
                    adapters[self.adapter_name(target)].bind(bank, site, linear, rows(target, model.cfg, ranks))
        self.variant.start(sites(self.config, model.cfg))
        model.__dict__.setdefault("factor_banks", {})[self.scheme] = bank
        model.adapter_keys = model._get_all_keys() - model.base_keys
        with open_dict(model.cfg):
            record = {"checksums": bank.checksums, **self.variant.decided()}
            OmegaConf.update(model.cfg, f"peft.{self.scheme}_tuning", record, force_add=True)


def _check_layout(cfg: DictConfig, scheme: str, targets: list[str]) -> None:
    """Refuse what would train something else than one model."""
    if cfg.get("tensor_model_parallel_size", 1) > 1:
        if scheme == "cond_lora":
            raise UsageError("model.peft.peft_scheme", scheme, "not supported with tensor parallelism yet")
        for target in targets:
            # Rows of a gated fc1 are not one block per rank; a row-parallel layer needs a reduction of its own.
            if TARGETS[target].parallel == "row" or (target == "mlp_fc1" and is_gated(cfg)):
                raise UsageError("target_modules", target, "not supported with tensor parallelism yet")
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        if cfg.get(name, 1) not in (None, 1):
            raise UsageError(f"model.{name}", cfg.get(name), "factors tied across such ranks are not supported yet")
    if cfg.get("sequence_parallel"):
        raise UsageError("model.sequence_parallel", True, "not supported yet; set it to false")


def _check_optimizer(cfg: DictConfig, config: VariantConfig) -> None:
    """Refuse an optimizer that would not do as the settings say."""
    name = (cfg.get("optim") or {}).get("name")
    if name != "mcore_distributed_optim":
        return
    if isinstance(config, DynamicConfig):
        raise UsageError("model.optim.name", name, "it would move inactive modules; use adamw or fused_adam")
    if config.lr_ratio != 1:
        raise UsageError("lr_ratio", config.lr_ratio, f"model.optim.name={name} has one learning rate; use fused_adam")
