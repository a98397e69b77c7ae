"""Targets of models of all forms: their names and sizes, and their rows, against how Megatron-core splits them."""

import fused
import pytest
import torch
from omegaconf import OmegaConf

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.targets import blocks, expand, is_gated, rows, shape

HIDDEN, FFN = 24, 20
#: By name: heads, query groups and the size of a head as a config says them, and as they are.
ATTENTIONS = {
    "one head per group": ((6, None, None), (6, 6, 4)),
    "as many groups as heads": ((6, 6, None), (6, 6, 4)),
    "groups of two": ((8, 4, None), (8, 4, 3)),
    "two groups of four": ((8, 2, None), (8, 2, 3)),
    "one group": ((8, 1, None), (8, 1, 3)),
    "wider heads": ((6, 2, 5), (6, 2, 5)),
    "narrower heads": ((4, 4, 3), (4, 4, 3)),
}


def model(heads=6, groups=None, head_dim=None, activation="fast-swiglu"):
    """A model config with the fields that decide its linear layers."""
    return OmegaConf.create(
        {
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": FFN,
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "kv_channels": head_dim,
            "activation": activation,
        }
    )


def numbered(out):
    """A weight (out, 1) that has its rows' numbers in it."""
    return torch.arange(out)[:, None]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_rows_of_q_k_and_v_are_those_that_attention_makes_them_of(name):
    said, (heads, groups, head_dim) = ATTENTIONS[name]
    config, fused_rows = model(*said), (heads + 2 * groups) * head_dim
    assert shape("attention_qkv", config) == (HIDDEN, fused_rows) and rows("attention_qkv", config) is None
    assert shape("attention_dense", config) == (heads * head_dim, HIDDEN) and rows("attention_dense", config) is None
    for ranks in (1, 2, 4):
        if groups % ranks:
            continue
        weight = numbered(fused_rows // ranks)
        parts = fused.queries_keys_values(weight, heads // ranks, groups // ranks, head_dim)
        for part, expected in parts.items():
            found = rows(f"attention_{part}", config, ranks)
            assert found.tolist() == expected.flatten().tolist(), (part, ranks)
            assert shape(f"attention_{part}", config) == (HIDDEN, len(found) * ranks)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_rows_of_gate_and_up_are_those_that_the_mlp_makes_them_of(ranks):
    config = model()
    assert shape("mlp_fc1", config) == (HIDDEN, 2 * FFN) and rows("mlp_fc1", config) is None
    assert shape("mlp_fc2", config) == (FFN, HIDDEN) and rows("mlp_fc2", config) is None
    for part, expected in fused.gate_up(numbered(2 * FFN // ranks)).items():
        assert rows(f"mlp_{part}", config, ranks).tolist() == expected.flatten().tolist()
        assert shape(f"mlp_{part}", config) == (HIDDEN, FFN)


@pytest.mark.parametrize(
    ("activation", "gated"),
    {
        "gelu": False,
        "squared-relu": False,
        "openai-gelu": False,
        "geglu": True,
        "reglu": True,
        "swiglu": True,
        "fast-geglu": True,
        "fast-reglu": True,
        "fast-swiglu": True,
    }.items(),
)
def test_gate_and_up_are_stacked_in_fc1_of_a_gated_activation_only(activation, gated):
    config = model(activation=activation)
    assert is_gated(config) is gated
    assert shape("mlp_fc1", config) == (HIDDEN, 2 * FFN if gated else FFN)
    assert blocks("mlp_fc1", config) == (2 if gated else 1)
    one_block = ("attention_qkv", "attention_q", "attention_k", "attention_v", "attention_dense", "mlp_fc2")
    assert {blocks(target, config) for target in (*one_block, "mlp_gate", "mlp_up")} == {1}
    for target in () if gated else ("mlp_gate", "mlp_up"):
        with pytest.raises(UsageError, match=f"{target}.*{activation}.*has no gate"):
            shape(target, config)


def test_an_activation_that_is_not_said_has_no_gate():
    config = model()
    del config.activation
    assert not is_gated(config) and shape("mlp_fc1", config) == (HIDDEN, FFN)


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (["attention"], ["attention_qkv", "attention_dense"]),
        (["mlp"], ["mlp_fc1", "mlp_fc2"]),
        (["all"], ["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"]),
        (["mlp_down"], ["mlp_fc2"]),
        (["mlp_fc2", "attention"], ["mlp_fc2", "attention_qkv", "attention_dense"]),
        (["attention_dense", "attention", "attention_dense"], ["attention_dense", "attention_qkv"]),
        (["attention_v", "mlp_up", "mlp_gate"], ["attention_v", "mlp_up", "mlp_gate"]),
        (["mlp_down", "mlp_fc2"], ["mlp_fc2"]),
    ],
)
def test_names_stand_for_targets_each_once_and_in_order(names, targets):
    assert expand(names) == targets


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "at least one of attention_qkv"),
        (["attention_qvk"], "did you mean 'attention_qkv'"),
        (["attention", "attention_k"], "attention_k.*inside a fused projection"),
        (["mlp_gate", "all"], "mlp_gate.*inside a fused projection"),
    ],
)
def test_names_that_stand_for_nothing_or_for_one_matrix_twice_are_refused(names, said):
    with pytest.raises(UsageError, match=said):
        expand(names)
