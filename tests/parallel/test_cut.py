"""What each tensor rank holds of a tensor, against what Megatron-core's checkpoints give it of the layer's weight."""

import fused
import pytest
import torch
from omegaconf import OmegaConf

from nemo_tiedlora.model.targets import TARGETS, blocks, expand, rows, shape
from nemo_tiedlora.parallel.cut import cut, join
from nemo_tiedlora.variants import Init, TensorSpec

#: The dimensions of tensors behind factors: A, B, u, v, what CondLoRA forms A and B from, and a whole W.
AXES = [("rank", "in"), ("out", "rank"), ("rank",), ("out",), ("in",), ("in", "rank"), ("rank", "out"), ("out", "in")]
#: What a layer's weight (out, in) is cut along.
CUT = {"column": "out", "row": "in"}
RANKS = [1, 2, 4]
HEADS, GROUPS, HEAD_DIM = 8, 4, 3
MODEL = OmegaConf.create(
    {
        "num_layers": 1,
        "hidden_size": 16,
        "ffn_hidden_size": 20,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "kv_channels": HEAD_DIM,
        "activation": "fast-swiglu",
    }
)


def of_axes(*axes):
    return TensorSpec("key", axes, Init("normal"), True, "")


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("target", ["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"])
@pytest.mark.parametrize("axes", AXES, ids="×".join)
def test_a_rank_holds_what_belongs_to_its_part_of_the_weight(target, axes, ranks):
    parallel, layout = TARGETS[target].parallel, (TARGETS[target].parallel, blocks(target, MODEL))
    sizes = dict(zip(("in", "out"), shape(target, MODEL), strict=True)) | {"rank": 4}
    whole = torch.arange(torch.Size(sizes[axis] for axis in axes).numel()).view([sizes[axis] for axis in axes])
    parts = [cut(whole, of_axes(*axes), *layout, ranks, rank) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        expected = whole
        if CUT[parallel] in axes:
            # Of the weight's rows or columns themselves; then what lies along them in the tensor.
            mine = fused.held(torch.arange(sizes[CUT[parallel]]), 0, rank, ranks, target == "mlp_fc1")
            expected = whole.index_select(axes.index(CUT[parallel]), mine)
        assert torch.equal(part, expected)
    assert torch.equal(join(parts, of_axes(*axes), *layout), whole)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("part", ["q", "k", "v", "gate", "up"])
def test_a_rank_holds_the_rows_of_a_matrix_inside_a_fused_one_that_are_in_its_part_of_it(part, ranks):
    target = next(target for target, where in TARGETS.items() if where.part == part)
    whole_target = "mlp_fc1" if part in ("gate", "up") else "attention_qkv"
    weight = torch.arange(shape(whole_target, MODEL)[1])[:, None]
    every = weight[rows(target, MODEL)]
    layout = TARGETS[target].parallel, blocks(target, MODEL)
    parts = []
    for rank in range(ranks):
        mine = fused.held(weight, 0, rank, ranks, whole_target == "mlp_fc1")
        if whole_target == "mlp_fc1":
            expected = fused.gate_up(mine)[part]
        else:
            expected = fused.queries_keys_values(mine, HEADS // ranks, GROUPS // ranks, HEAD_DIM)[part]
        assert torch.equal(mine[rows(target, MODEL, ranks)], expected)
        parts.append(cut(every, of_axes("out", "rank"), *layout, ranks, rank))
        assert torch.equal(parts[-1], expected)
    assert torch.equal(join(parts, of_axes("out", "rank"), *layout), every)


def test_every_target_is_a_layer_of_megatrons_and_cut_as_that_is():
    """Column-parallel layers split their outputs, row-parallel ones their inputs."""
    layers = {
        "self_attention.linear_qkv": "column",
        "self_attention.linear_proj": "row",
        "mlp.linear_fc1": "column",
        "mlp.linear_fc2": "row",
    }
    assert {TARGETS[target].path: TARGETS[target].parallel for target in expand(["all"])} == layers
    assert {where.path: where.parallel for where in TARGETS.values()} == layers
