"""One logical model under every layout: losses, norms, parameters and choices are those of a single process."""

import itertools
from functools import cache

import pytest
import torch
import toy
import world

from nemo_tiedlora import platform

STEPS = 10
RANK = 5  # no multiple of any number of ranks, and no size of anything else
SINGLE = ["attention_q", "attention_k", "attention_v", "attention_dense", "mlp_gate", "mlp_up", "mlp_fc2"]
#: Adam moves an element by the learning rate however small its gradient is, in the direction of rounding noise where
#: that is all there is; with an eps above the noise, what differs by rounding goes on to differ by rounding.
OPTIM = toy.OPTIM | {"eps": 1e-4}


def case(scheme, steps=STEPS, model=None, **settings):
    settings = {"rank": RANK, "target_modules": ["all"]} | settings
    peft = {"peft_scheme": scheme, f"{scheme}_tuning": settings}
    return {"peft": peft, "steps": steps, "model": {"optim": OPTIM} | (model or {})}


#: Gloo sums only, and does not average.
DISTRIBUTED = OPTIM | {"name": "mcore_distributed_optim", "average_in_collective": False}
RECOMPUTED = {
    "activations_checkpoint_granularity": "full",
    "activations_checkpoint_method": "uniform",
    "activations_checkpoint_num_layers": 1,
}
CASES = {
    "LoRA": case("tied_lora", preset="LoRA"),
    "TL6": case("tied_lora", target_modules=SINGLE),
    "VeRA": case("vera"),
    "ShareLoRA": case("share_lora", groups=[[1, 2]], train=["A", "B", "u", "v"]),  # on both sides of a stage boundary
    "CondLoRA": case("cond_lora", target_modules=[*SINGLE[:4], "mlp_fc1", "mlp_fc2"]),
    "CondLoRA, the authors' orientation": case(
        "cond_lora", steps=4, orientation="authors", target_modules=["attention_q", "attention_dense"]
    ),
    "LoRA-XS": case("lora_xs", steps=6, std_R=0.1),
    "Uni-LoRA": case("uni_lora", steps=6, dimension=300, bound=0.2),
    "DynaLoRA": case("dyna_lora", period=3, inner="tied_lora", optimizer="local"),
    "TL6 with DoRA and LoRA+": case("tied_lora", steps=8, dora=True, lr_ratio=4),
    "DynaLoRA over CondLoRA, backward importance": case(
        "dyna_lora", steps=8, period=2, importance="backward", inner="cond_lora"
    ),
    "TL6, full recomputation": case("tied_lora", steps=6, model=RECOMPUTED),
    "TL6, selective recomputation": case(
        "tied_lora", steps=6, model={"activations_checkpoint_granularity": "selective"}
    ),
    "CondLoRA in bfloat16": case("cond_lora", steps=6, model={"megatron_amp_O2": True}) | {"precision": "bf16"},
    "DynaLoRA over TL6 in bfloat16": case(
        "dyna_lora", 6, {"megatron_amp_O2": True}, inner="tied_lora", period=2, allocator="random", optimizer="local"
    )
    | {"precision": "bf16"},
    "TL6 with dropout": case("tied_lora", steps=4, dropout=0.3),
    "TL6, distributed optimizer": case("tied_lora", steps=6, model={"optim": DISTRIBUTED}, target_modules=SINGLE),
}
#: What NeMo does without us, to count its collectives.
STOCK = {
    "stock LoRA": {"peft": toy.STOCK_SCHEMES["lora-all"], "steps": 2},
    "stock none": {"peft": {"peft_scheme": "none"}, "steps": 2},
}
LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2 SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "TP2 PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
#: Sequence parallelism refuses backward importance.
REFUSED = {"TP2 SP": ["DynaLoRA over CondLoRA, backward importance"]}
RECOMPUTATION = ["TL6, full recomputation", "TL6, selective recomputation"]
#: Cases left out: those, and what would show nothing new in its time.
LEFT_OUT = {
    "PP2": ["CondLoRA, the authors' orientation", RECOMPUTATION[1], "CondLoRA in bfloat16", "TL6 with dropout"],
    "DP2": ["CondLoRA, the authors' orientation", *RECOMPUTATION, "TL6 with DoRA and LoRA+", "TL6 with dropout"],
    "TP2 SP": [*RECOMPUTATION, "CondLoRA in bfloat16", *REFUSED["TP2 SP"]],
    "TP2 PP2": [
        *RECOMPUTATION, "CondLoRA in bfloat16", "TL6 with DoRA and LoRA+", "TL6 with dropout",
        "DynaLoRA over CondLoRA, backward importance",
    ],
}  # fmt: skip
#: Of the others, those that `make test` runs: every layout, every case, and what each cuts or sums in a way of its own.
QUICK = {
    "TP2": [
        "LoRA", "TL6", "CondLoRA", "CondLoRA, the authors' orientation", "TL6 with DoRA and LoRA+",
        "DynaLoRA over CondLoRA, backward importance", "Uni-LoRA",
        *RECOMPUTATION, "TL6 with dropout",
    ],
    "PP2": ["VeRA", "Uni-LoRA", "ShareLoRA", "DynaLoRA", "TL6, distributed optimizer"],
    "DP2": ["CondLoRA in bfloat16", "DynaLoRA over TL6 in bfloat16", "TL6, distributed optimizer"],
    "TP2 SP": ["ShareLoRA", "DynaLoRA", "LoRA-XS"],
    "TP2 PP2": ["TL6"],
}  # fmt: skip


def pairs(*without):
    """Every layout with its cases, as test parameters."""
    return [
        pytest.param(layout, name, marks=[] if name in QUICK[layout] else [pytest.mark.thorough])
        for layout in LAYOUTS
        for name in CASES
        if name not in LEFT_OUT.get(layout, []) and name not in without
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    with platform.host(), toy.clean_megatron():
        base = toy.save_base(toy.llama_config(toy.tokenizer(folder)), folder / "llama.nemo")
        return toy.rows(folder) | {"base": base}


@pytest.fixture(scope="module")
def trained(request, files, tmp_path_factory):
    """Trains, under a layout or ``alone``, the cases of this file's tests that are run now.

    Returns:
        ``trained(layout)`` → case → one record per rank.
    """
    chosen = [item.callspec.params for item in request.session.items if item.path == request.path]

    @cache
    def train(layout):
        processes, overrides = LAYOUTS.get(layout, (1, {}))
        names = {params["name"] for params in chosen if layout in (params["layout"], "alone")}
        cases = {name: CASES[name] for name in CASES if name in names}
        if layout == "TP2":
            cases |= STOCK
        return world.run(tmp_path_factory.mktemp("layout") / "run", cases, files, processes, overrides)

    return train


def mine(whole, key, rank, ranks, turned=False):
    """What a tensor rank holds, by the layout of Megatron's own weights, written down once more.

    Under the authors' ``turned`` orientation θ_A runs over what θ_B does.
    """
    target, part = key.split(".")[0], key.split(".")[-1].replace("theta_A", "theta_B" if turned else "theta_A")
    column = target not in ("attention_dense", "mlp_fc2")
    axis = {
        ("B", True): 0, ("v", True): 0, ("m", True): 0, ("theta_A", True): 0, ("A", False): 1, ("theta_B", False): 0,
        ("columns_B", True): 0, ("columns_A", False): 1,
    }.get((part, column))  # fmt: skip
    if axis is None or ranks == 1:
        return whole
    stacked = 2 if target == "mlp_fc1" else 1  # gate and up, each cut on its own
    size = whole.shape[axis] // stacked // ranks
    rows = [torch.arange(size) + size * rank + block * size * ranks for block in range(stacked)]
    return whole.index_select(axis, torch.cat(rows))


@pytest.mark.parametrize(("layout", "name"), pairs("TL6 with dropout"))
def test_every_layout_trains_the_same_model(trained, layout, name):
    (reference,), ranks = trained("alone")[name], trained(layout)[name]
    tensor_ranks = LAYOUTS[layout][1].get("tensor_model_parallel_size", 1)
    if "bfloat16" in name:  # sums are rounded in another order
        assert ranks[0]["losses"] == pytest.approx(reference["losses"], rel=5e-3)
        return
    assert ranks[0]["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert len(reference["grad_norms"]) == CASES[name]["steps"] and min(reference["grad_norms"]) > 0
    assert ranks[0]["grad_norms"] == pytest.approx(reference["grad_norms"], rel=5e-5)
    if CASES[name]["steps"] == STEPS:
        assert sum(reference["losses"][STEPS // 2 :]) < sum(reference["losses"][: STEPS // 2])
    held = set()
    for rank, record in enumerate(ranks):
        held |= set(record["tensors"])
        for key, tensor in record["tensors"].items():
            expected = mine(reference["tensors"][key], key, rank % tensor_ranks, tensor_ranks, "orientation" in name)
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
        if "history" in reference:
            assert record["history"]["active_steps"] == reference["history"]["active_steps"]
            assert [entry["active"] for entry in record["history"]["log"]] == [
                entry["active"] for entry in reference["history"]["log"]
            ]
    assert held == set(reference["tensors"])


@pytest.mark.parametrize(("layout", "name"), pairs())
def test_what_several_ranks_hold_is_equal_to_the_bit(trained, layout, name):
    tensor_ranks = LAYOUTS[layout][1].get("tensor_model_parallel_size", 1)
    compared = 0
    for (one, first), (other, second) in itertools.combinations(enumerate(trained(layout)[name]), 2):
        for key in set(first["tensors"]) & set(second["tensors"]):
            whole = torch.empty(first["tensors"][key].shape)
            replicated = mine(whole, key, 0, 2, "orientation" in name).shape == whole.shape
            if replicated or one % tensor_ranks == other % tensor_ranks:
                assert torch.equal(first["tensors"][key], second["tensors"][key]), key
                compared += 1
    per_layer = layout == "PP2" and name in ("LoRA", "LoRA-XS")  # nothing is on two stages
    assert compared or per_layer


def exchanged(record):
    """Numbers of collectives in one step: of values as wide as the rank, and as wide as the hidden size."""
    narrow = [shape for _, shape in record["collectives"] if shape and len(shape) == 2 and shape[-1] == RANK]
    wide = [shape for _, shape in record["collectives"] if shape and len(shape) == 3 and shape[-1] == 32]
    return len(narrow), len(wide)


@pytest.mark.parametrize(("layout", "name"), [("TP2", "LoRA")])
def test_tensor_parallelism_costs_one_narrow_collective_per_layer_and_micro_batch(trained, layout, name):
    """Stock LoRA beside it: an all-gather of r, an all-reduce of r and one of the full hidden size."""
    records = trained(layout)
    narrow, wide = exchanged(records[name][0])
    assert narrow == 2 * 4 * 4  # micro-batches, layers, targets: a backward one for qkv and fc1, a forward one else
    assert wide <= exchanged(records["stock none"][0])[1]
    assert exchanged(records["stock LoRA"][0])[1] > wide
