"""A process that stands for a machine: writes adapters with frozen factors into a folder, and reads those of another.

    python machine.py WRITTEN [READ]

It prints, as JSON, a digest of all that each adapter written or read is made of.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from checkpoint.conftest import _make
from torch import nn

from nemo_tiedlora.checkpoint import Adapter, read, write
from nemo_tiedlora.checkpoint.merge import Changes
from nemo_tiedlora.variants import Bank, FrozenWeight

METHODS = {
    **{preset: ("tied_lora", {"preset": preset}) for preset in ("TL1", "TL2", "TL3", "TL4")},
    "untied": ("tied_lora", {"train": ["A", "u"], "tie": [], "init_B": "kaiming_uniform"}),
    "vera": ("vera", {"target_modules": ["all"], "init_A": "xavier", "init_B": "kaiming_normal"}),
    "dyna": ("dyna_lora", {"inner": "vera", "active": 2}),
    "dyna-tied": ("dyna_lora", {"inner": "tied_lora", "settings": {"preset": "TL4"}}),
    # All of its factors are trained: only their start is drawn.
    "share": ("share_lora", {"groups": "random_adjacent", "train": ["A", "B", "u", "v"]}),
}


def made() -> dict[str, Adapter]:
    """Adapters of every method with random factors, and one as earlier versions wrote it."""
    adapters = {name: trained(_make(scheme, **settings)) for name, (scheme, settings) in METHODS.items()}
    old = trained(_make("vera", shape={"hidden_size": 256}, drawing_rule=1))
    checksums = {key: text.split()[0] for key, text in old.settings["checksums"].items()}
    settings = {name: value for name, value in old.settings.items() if name != "drawing_rule"}
    return adapters | {"old": replace(old, settings=settings | {"checksums": checksums}), "old rule": old}


def trained(adapter: Adapter) -> Adapter:
    """With tensors that are the same on every machine, which torch's random ones are not."""
    return replace(adapter, tensors={key: torch.arange(t.numel()).view_as(t) / 7 for key, t in adapter.tensors.items()})


@torch.no_grad()
def digest(adapter: Adapter) -> str:
    """Of the tensors that training would start with, and of every layer's factors."""
    bank, changes, found = Bank(adapter.variant, checksums=adapter.config.checksums), Changes(adapter), hashlib.sha256()
    for site in adapter.sites:
        weight = FrozenWeight(torch.zeros(site.out_features, site.in_features))
        bank.adopt(nn.Module(), site, weight)
        for factors in (bank.factors(site, weight), changes.factors(site, weight)):
            found.update(factors.A.numpy().tobytes() + factors.B.numpy().tobytes())
    return found.hexdigest()


def main(written: Path, *others: Path) -> None:
    for name, adapter in made().items():
        write(adapter, written / name)
    names = [path.name for path in sorted(written.iterdir())]
    # A machine's own files of the old rule would be noted too.
    own = {name: digest(read(written / name)) for name in names if not name.startswith("old")}
    print(json.dumps([own, *({name: digest(read(other / name)) for name in names} for other in others)]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
