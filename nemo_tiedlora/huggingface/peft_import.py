"""Adapters of Hugging Face PEFT (LoRA, DoRA, VeRA), taken over as ours: bit by bit the same factors."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.families import read_config
from nemo_tiedlora.huggingface.modules import Module, Modules
from nemo_tiedlora.huggingface.peft_lora import CONFIG, PREFIX, WEIGHTS
from nemo_tiedlora.model.targets import TARGETS, order, shape, whole

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_tiedlora.checkpoint import Adapter
    from nemo_tiedlora.checkpoint.base import BaseFile
    from nemo_tiedlora.model.data import ModelConfig

#: What there is of a module, by PEFT's kind of adapter.
PARTS = {
    "LORA": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "VERA": ("vera_lambda_d", "vera_lambda_b"),
}
#: All modules' A and B of VeRA.
SHARED = ("base_model.vera_A", "base_model.vera_B")
#: Fields that are read here, and those that decide nothing about what an adapter computes.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "vera_dropout", "use_rslora", "use_dora", "init_lora_weights"}
_OTHER = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size", "save_projection", "projection_prng_key", "d_initial", "init_weights", "runtime_config",
}  # fmt: skip
#: Starts after which the base is another one.
_CHANGED = ("pissa", "olora", "corda", "loftq")
#: More than any adapter has.
MOST_BYTES = 2**36


def import_peft(folder: Path, base: str | Path, out: Path) -> dict[str, Any]:
    """Write a PEFT adapter as ours, and say what it is.

    Separate projections whose A is one and the same in every layer become the fused projection with that A.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the model it was trained on, as ``base_at`` takes it; taken over once the adapter's config is known.
        out: a folder, or a ``.nemo``.

    Raises:
        UsageError: another kind of adapter, a setting that ours does not have, by its name, a damaged file, or tensors
            that do not fit the base.
    """
    from nemo_tiedlora.checkpoint import write
    from nemo_tiedlora.checkpoint.base import open_base
    from nemo_tiedlora.files import check_not_among
    from nemo_tiedlora.huggingface.bases import find

    check_not_among(out, base, folder)
    found, config = find(base), _config(folder)
    with open_base(found.file()) as source:
        made = _Import(folder, config, source).adapter()
    sha256 = write(made, out)
    facts = {"file": str(out), "scheme": made.scheme, "adapter_sha256": sha256}
    facts["trainable"] = sum(made.tensors[key].numel() for key, (spec, _) in made.specs.items() if spec.trained)
    return facts | {name: made.settings.get(name) for name in ("rank", "alpha", "target_modules", "dora")}


def _config(folder: Path) -> dict[str, Any]:
    config = read_config(folder, CONFIG, field="adapter")
    if config.get("peft_type") not in PARTS:
        raise UsageError("peft_type", config.get("peft_type"), f"in {CONFIG}; must be one of {', '.join(PARTS)}")
    for name, value in config.items():
        if value not in (None, False, "none") and value != {} and name not in _READ | _OTHER:
            raise UsageError(name, value, f"in {CONFIG}; an adapter of ours has nothing like it")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED):
        raise UsageError("init_lora_weights", start, f"in {CONFIG}; it changes the base; let PEFT convert the adapter")
    if type(config.get("r")) is not int or config["r"] < 1:
        raise UsageError("r", config.get("r"), f"in {CONFIG}; must be a whole number above 0")
    return config


class _Import:
    """A PEFT adapter on its way: its tensors by module and layer, in the base's sizes."""

    def __init__(self, folder: Path, config: dict[str, Any], base: BaseFile):
        from nemo_tiedlora.huggingface.families import family_of
        from nemo_tiedlora.huggingface.given_back import hf_config

        self.folder, self.config, self.base = folder, config, base
        self.kind: str = config["peft_type"]
        self.modules: Modules = family_of(hf_config(base.config)).modules
        self.found: dict[Module, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        self.shared: dict[str, Tensor] = {}
        for name, tensor in self._read().items():
            self._note(name, tensor)
        self.layers = self._check()

    def _error(self, reason: str) -> UsageError:
        return UsageError("adapter", str(self.folder), reason)

    def _read(self) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / WEIGHTS
        if not path.is_file():
            pickled = (self.folder / "adapter_model.bin").exists()
            way_out = (
                ", but a pickled one, which could run code; load it with PEFT and save it again" if pickled else ""
            )
            raise self._error(f"there is no {WEIGHTS} in it{way_out}")
        if path.stat().st_size > MOST_BYTES:
            raise self._error(f"{WEIGHTS} is larger than it can be: more than {MOST_BYTES:,} bytes")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise self._error(f"{WEIGHTS} is damaged or cut off ({error})") from None

    def _note(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise self._error(f"the tensor {name} has something other than finite numbers in it")
        if self.kind == "VERA" and name in SHARED:
            self.shared[name] = tensor
            return
        named = re.fullmatch(rf"{re.escape(PREFIX + self.modules.layers)}\.(\d+)\.(.+)", name, re.ASCII)
        for module in self.modules.linear if named else ():
            for part in PARTS[self.kind]:
                if named and named[2] == f"{module.name}.{part}" and int(named[1]) < self.base.config.num_layers:
                    self.found[module][int(named[1])][part] = tensor
                    return
        raise self._error(f"there is no place for its tensor {name} in the base")

    def _check(self) -> list[int]:
        """The adapted layers, counted from 0, once every tensor is there and has the base's sizes."""
        if not self.found:
            raise self._error("there are no tensors in it")
        layers = {layer for by_layer in self.found.values() for layer in by_layer}
        parts = PARTS[self.kind] if self.config.get("use_dora") or self.kind == "VERA" else PARTS[self.kind][:2]
        rank = self.config["r"]
        for module, by_layer in self.found.items():
            columns, height = self._sizes(module)
            expected = dict(zip(PARTS["LORA"], ((rank, columns), (height, rank), (height,)), strict=True))
            expected |= dict(zip(PARTS["VERA"], ((rank,), (height,)), strict=True))
            for layer in layers:
                place = f"{self.modules.layers}.{layer}.{module.name}"
                if layer not in by_layer:
                    raise self._error(
                        f"{place} has no adapter, but other layers' {module.name} has; ours has it in all"
                    )
                if set(by_layer[layer]) != set(parts):
                    raise self._error(
                        f"{place} has {', '.join(sorted(by_layer[layer]))}; it must have {', '.join(parts)}"
                    )
                for part, tensor in by_layer[layer].items():
                    if tuple(tensor.shape) != expected[part]:
                        sizes = f"{tuple(tensor.shape)}; the base and r={rank} say {expected[part]}"
                        raise self._error(f"{place}.{part} has shape {sizes}")
        return sorted(layers)

    def _sizes(self, module: Module) -> tuple[int, int]:
        sizes = [shape(part, self.base.config) for part in module.parts]
        return sizes[0][0], sum(height for _, height in sizes)

    def adapter(self) -> Adapter:
        """The adapter in the canonical form."""
        from nemo_tiedlora.checkpoint import Adapter, Base
        from nemo_tiedlora.checkpoint.adapter import paths_of, settings_of
        from nemo_tiedlora.variants import build, config_for

        scheme = "vera" if self.kind == "VERA" else "tied_lora"
        tensors = self._vera() if self.kind == "VERA" else self._lora()
        model: ModelConfig = self.base.config
        some = [layer + 1 for layer in self.layers] if len(self.layers) < model.num_layers else None
        settings = self._settings() | {"target_modules": list(dict.fromkeys(key.split(".")[0] for key in tensors))}
        config = config_for(scheme, settings | {"layer_selection": some})
        base = Base.of(model, self.base.checksums(paths_of(config, model)))
        return Adapter(scheme, settings_of(config, build(config, model.num_layers), {}), base, tensors)

    def _settings(self) -> dict[str, Any]:
        rank, dropout = self.config["r"], float(self.config.get(f"{self.kind.lower()}_dropout") or 0)
        if self.kind == "VERA":
            return {"rank": rank, "dropout": dropout, "store_frozen": True}
        alpha = float(self.config.get("lora_alpha") or rank) * (math.sqrt(rank) if self.config.get("use_rslora") else 1)
        settings = {"preset": "LoRA", "rank": rank, "alpha": alpha, "dropout": dropout}
        return settings | {"dora": bool(self.config.get("use_dora"))}

    def _lora(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        A, B, m = PARTS["LORA"]
        for target, modules in self._targets().items():
            for layer in self.layers:
                parts = [self.found[module][layer] for module in modules]
                tensors[f"{target}.{layer}.A"] = parts[0][A]
                tensors[f"{target}.{layer}.B"] = self._rows(target, modules, [part[B] for part in parts])
                if m in parts[0]:
                    tensors[f"{target}.{layer}.m"] = self._rows(target, modules, [part[m] for part in parts])
        return tensors

    def _targets(self) -> dict[str, list[Module]]:
        """Our targets, each with the modules that it is; see ``import_peft``."""
        A, found = PARTS["LORA"][0], {}
        for path in dict.fromkeys(TARGETS[module.parts[0]].path for module in self.modules.linear):
            modules = [module for module in self.modules.linear if TARGETS[module.parts[0]].path == path]
            there = [module for module in modules if module in self.found]
            one = there == modules and all(
                self.found[module][layer][A].equal(self.found[modules[0]][layer][A])
                for module in modules
                for layer in self.layers
            )
            if one:
                found[whole(path)] = modules
            else:
                found |= {module.parts[0]: [module] for module in there}
        return found

    def _vera(self) -> dict[str, Tensor]:
        if set(self.shared) != set(SHARED):
            raise self._error("without its A and B, which PEFT would draw again; save it with save_projection=True")
        A, B = (self.shared[name] for name in SHARED)
        tensors: dict[str, Tensor] = {}
        for module, by_layer in self.found.items():
            columns, height = self._sizes(module)
            target = module.parts[0] if len(module.parts) == 1 else whole(TARGETS[module.parts[0]].path)
            if A.dim() != 2 or B.dim() != 2 or A.shape[1] < columns or B.shape[0] < height:
                sizes = f"{tuple(A.shape)} and {tuple(B.shape)}"
                raise self._error(
                    f"its A and B of shapes {sizes} are too small for {module.name}: ({height}, {columns})"
                )
            tensors[f"{target}.A"] = A[:, :columns]
            tensors[f"{target}.B"] = self._rows(target, [module], [B[:height]])
            for layer, parts in by_layer.items():
                tensors[f"{target}.{layer}.u"] = parts["vera_lambda_d"]
                tensors[f"{target}.{layer}.v"] = self._rows(target, [module], [parts["vera_lambda_b"]])
        return tensors

    def _rows(self, target: str, modules: list[Module], parts: list[Tensor]) -> Tensor:
        """What modules have one below the other, in the order of the target's rows."""
        import torch

        given = tuple(part for module in modules for part in module.parts)
        return torch.cat(parts)[order((target,), given, self.base.config)]
