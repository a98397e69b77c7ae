"""Shapes of bases: the same in other words is the same."""

import pytest
from omegaconf import OmegaConf

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.config import check_shape

SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "activation": "gelu"}


def test_what_a_config_leaves_out_is_what_nemo_takes():
    said = OmegaConf.create(SHAPE | {"num_query_groups": 4, "kv_channels": 16})
    for config in (SHAPE, SHAPE | {"num_query_groups": None, "kv_channels": None}):
        check_shape(said, OmegaConf.create(config), "adapter", "a")
        check_shape(OmegaConf.create(config), said, "adapter", "a")
    with pytest.raises(UsageError, match="kv_channels was 16, here it is 32"):
        check_shape(OmegaConf.create(SHAPE), OmegaConf.create(SHAPE | {"kv_channels": 32}), "adapter", "a")
