"""Adapters with random tensors, for a base that is there."""

import torch

from nemo_tiedlora.checkpoint import Adapter, Base, write
from nemo_tiedlora.checkpoint.adapter import paths_of, settings_of, specs_of
from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.model.sizes import sites
from nemo_tiedlora.variants import build, config_for
from nemo_tiedlora.variants.frozen import record


def adapter_for(base, path, scheme, deviation=0.3, **settings):
    """Write an adapter to ``path`` whose change of ``base`` is large, and return it."""
    draw = torch.Generator().manual_seed(7)
    with open_base(base) as opened:
        config = config_for(scheme, {"rank": 4} | settings)
        variant = build(config, opened.config.num_layers)
        adapted = sites(config, opened.config)
        variant.start(adapted)
        tensors, checksums = {}, {}
        for key, (spec, site) in specs_of(variant, adapted).items():
            size = spec.shape(site, variant.rank)
            if spec.stored:
                tensors[key] = deviation * torch.randn(size, generator=draw) + (key[-1] in "muv")
            elif spec.init.random:
                drawn = spec.init.draw(size, variant.seed, key, variant.drawing_rule)
                checksums[key] = record(drawn, spec.init.unit(size))
        base_of = Base.of(opened.config, opened.checksums(paths_of(config, opened.config)))
        made = Adapter(scheme, settings_of(config, variant, checksums), base_of, tensors)
    write(made, path)
    return made
