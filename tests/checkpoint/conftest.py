"""Adapters with random tensors, made from settings and a base's shape alone."""

from dataclasses import asdict

import pytest
import torch
from omegaconf import OmegaConf

from nemo_tiedlora.checkpoint import Adapter, Base
from nemo_tiedlora.checkpoint.adapter import settings_of, specs_of
from nemo_tiedlora.model.sizes import sites
from nemo_tiedlora.variants import build, config_for
from nemo_tiedlora.variants.frozen import record

SHAPE = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": None,
    "activation": "fast-swiglu",
}


def _make(scheme="tied_lora", shape=None, dtype=torch.float32, seed=0, **settings):
    model = OmegaConf.create(SHAPE | (shape or {}))
    config = config_for(scheme, {"rank": 4} | settings)
    variant = build(config, model.num_layers)
    specs = specs_of(variant, sites(config, model))
    draw = torch.Generator().manual_seed(seed)
    tensors, checksums = {}, {}
    for key, (spec, site) in specs.items():
        size = spec.shape(site, variant.rank)
        if spec.stored:
            tensors[key] = torch.randn(size, generator=draw).to(dtype)
        elif spec.init.random:
            drawn = spec.init.draw(size, variant.seed, key, variant.drawing_rule)
            checksums[key] = record(drawn, spec.init.unit(size))
    known = dict.fromkeys(("self_attention.linear_qkv", "mlp.linear_fc2"), "0" * 64)
    return Adapter(scheme, settings_of(config, variant, checksums), Base.of(model, known), tensors)


@pytest.fixture
def make():
    """``make(scheme, shape=..., dtype=..., seed=..., **settings)`` → an adapter."""
    return _make


@pytest.fixture
def same():
    """Whether two adapters are equal, tensors bit by bit."""

    def compare(one, other):
        assert asdict(one.base) == asdict(other.base)
        assert (one.scheme, one.settings, one.versions) == (other.scheme, other.settings, other.versions)
        assert set(one.tensors) == set(other.tensors)
        for key, tensor in one.tensors.items():
            assert tensor.dtype == other.tensors[key].dtype and torch.equal(tensor, other.tensors[key]), key
        return True

    return compare
