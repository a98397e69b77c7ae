"""VeRA (Kopiczko, Blankevoort, Asano, arXiv:2310.11454) as an adapter of Hugging Face PEFT.

PEFT has one A and one B for all modules, and takes the first rows of B for a smaller one. We have a pair per kind of
layer, and one for all rows of a fused projection: what both have is one kind of layer that is a module there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.modules import Module, Modules
from nemo_tiedlora.huggingface.peft_lora import PREFIX, common, save
from nemo_tiedlora.model.targets import TARGETS, expand, order, places
from nemo_tiedlora.variants import TiedConfig

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from nemo_tiedlora.checkpoint.plain_lora import PlainLora

OTHERWISE = "export it as peft-lora, which any adapter can be"


def write(lora: PlainLora, modules: Modules, folder: Path, dtype: dtype, base_name: str | None) -> dict[str, Any]:
    """Write the adapter into ``folder``, its A and B too; see ``peft_lora.write``.

    Raises:
        UsageError: PEFT's VeRA cannot be this adapter, and why.
    """
    module, target = _module(lora, modules)
    rows = order(module.parts, (target,), lora.adapter.shape)
    tensors: dict[str, Tensor] = {}
    for site in lora.adapter.sites:
        specs = lora.adapter.variant.tensors(site)
        parts = {name: lora.changes.tensors[spec.key] for name, spec in specs.items()}
        tensors |= {"base_model.vera_A": parts["A"], "base_model.vera_B": parts["B"][rows]}
        place = f"{PREFIX}{modules.layers}.{site.layer}.{module.name}"
        tensors[f"{place}.vera_lambda_d"] = parts["u"]
        tensors[f"{place}.vera_lambda_b"] = lora.scale * parts["v"][rows]
    config = {
        **common("VERA", lora, modules, [module.name], base_name),
        "r": lora.adapter.variant.rank,
        "vera_dropout": lora.adapter.config.dropout,
        "save_projection": True,
        "projection_prng_key": 0,
    }
    save(folder, config, tensors, dtype)
    facts = {"modules": len(lora.adapter.sites), "rank": lora.adapter.variant.rank}
    return {"parameters": sum(tensor.numel() for tensor in tensors.values()), **facts}


def _module(lora: PlainLora, modules: Modules) -> tuple[Module, str]:
    config = lora.adapter.config
    vera = isinstance(config, TiedConfig) and (set(config.train), set(config.tie)) == ({"u", "v"}, {"A", "B"})
    if not vera or config.dora:
        raise UsageError("format", "peft-vera", f"{lora.adapter.scheme} with these settings is not VeRA; {OTHERWISE}")
    targets = expand(config.target_modules)
    for module in modules.linear:
        same_path = TARGETS[module.parts[0]].path == TARGETS[targets[0]].path
        if len(targets) == 1 and same_path:
            found, wanted = places(module.parts, lora.adapter.shape), places((targets[0],), lora.adapter.shape)
            if torch.equal(found.sort().values, wanted.sort().values):
                return module, targets[0]
    alone = ", ".join(module.parts[0] for module in modules.linear if len(module.parts) == 1)
    way_out = f"PEFT's has one A and B for all modules, this one a pair for {', '.join(targets)}"
    raise UsageError("format", "peft-vera", f"{way_out}; train on one of {alone} alone, or {OTHERWISE}")
