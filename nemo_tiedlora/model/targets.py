"""The linear layers an adapter can sit on, by the names NeMo's configs use."""

import re
from dataclasses import dataclass, replace

from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.model.data import ModelConfig


@dataclass(frozen=True)
class Target:
    """Where a kind of linear layer is and how Megatron shards it.

    Args:
        path: its path below a Megatron-core ``TransformerLayer``.
        parallel: ``column`` (rows of W, so ``out``, are sharded) or ``row`` (``in`` is).
        part: the matrix inside a fused projection that it addresses; None is the whole.
        expert: number of the expert that it is inside of; None where there are none.
    """

    path: str
    parallel: str
    part: str | None = None
    expert: int | None = None


TARGETS = {
    "attention_qkv": Target("self_attention.linear_qkv", "column"),
    "attention_q": Target("self_attention.linear_qkv", "column", "q"),
    "attention_k": Target("self_attention.linear_qkv", "column", "k"),
    "attention_v": Target("self_attention.linear_qkv", "column", "v"),
    "attention_dense": Target("self_attention.linear_proj", "row"),
    "mlp_fc1": Target("mlp.linear_fc1", "column"),
    "mlp_gate": Target("mlp.linear_fc1", "column", "gate"),
    "mlp_up": Target("mlp.linear_fc1", "column", "up"),
    "mlp_fc2": Target("mlp.linear_fc2", "row"),
}
#: The fields of a NeMo GPT's model config that decide which linear layers it has, and of what shapes.
SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_moe_experts",
    "moe_ffn_hidden_size",
)
#: Those of them that may be null.
OPTIONAL_FIELDS = ("num_query_groups", "kv_channels", "num_moe_experts", "moe_ffn_hidden_size")

#: Instead of these, the shape of a model that NeMo does not run has its linear layers under this name, by kind: ``in``,
#: ``out`` and the numbers of the ``layers``.
KINDS = "kinds"

#: Names for several targets, or another name for one.
NAMES = {
    "attention": ["attention_qkv", "attention_dense"],
    "mlp": ["mlp_fc1", "mlp_fc2"],
    "all": ["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"],
    "mlp_down": ["mlp_fc2"],
}

#: A target inside one expert, as a kind of linear layer of its own: ``mlp_fc1_expert_2``.
IN_EXPERT = re.compile(r"(mlp_\w+)_expert_(\d+)", re.ASCII)
#: Where an expert is, below a transformer layer.
EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.", re.ASCII)
#: More experts than all layers of any model have together.
MOST_EXPERTS = 2**17


def expand(names: list[str]) -> list[str]:
    """The targets that ``names`` stand for, each once, in the order given.

    Raises:
        UsageError: no name, an unknown one, or a fused projection together with a matrix inside it.
    """
    if not names:
        raise UsageError("target_modules", names, f"name at least one of {', '.join(TARGETS)}")
    targets: list[str] = []
    for name in names:
        if name not in TARGETS and name not in NAMES:
            raise UsageError("target_modules", name, closest(name, [*TARGETS, *NAMES]))
        targets += [target for target in NAMES.get(name, [name]) if target not in targets]
    whole = {TARGETS[target].path for target in targets if TARGETS[target].part is None}
    for target in targets:
        if TARGETS[target].part and TARGETS[target].path in whole:
            raise UsageError("target_modules", target, "is inside a fused projection that is a target too; name one")
    return targets


def kinds(names: list[str], model: ModelConfig) -> list[str]:
    """The kinds of linear layer that ``names`` stand for in a model, each once, in the order given.

    They are ``expand``'s targets, but in a model of experts one in the MLP is as many kinds as there are experts, so
    that layers share what a method ties with the same expert of other layers only. Shared experts have none.

    Raises:
        UsageError: as ``expand``; or experts without linear layers of their own.
    """
    targets, experts = expand(names), model.get("num_moe_experts")
    if not experts:
        return targets
    if model.get("moe_grouped_gemm"):
        check_outside_experts(names, "the base's experts have no linear layers of their own (moe_grouped_gemm)")
    if experts * model.num_layers > MOST_EXPERTS:
        raise UsageError("num_moe_experts", experts, f"in {model.num_layers} layers, more than any model has")
    inside = [[f"{target}_expert_{number}" for number in range(experts)] for target in targets]
    return [
        kind for target, own in zip(targets, inside, strict=True) for kind in (own if is_in_mlp(target) else [target])
    ]


def where(kind: str) -> Target:
    """Where a kind of linear layer is and how Megatron shards it."""
    inside = IN_EXPERT.fullmatch(kind)
    if not inside:
        return TARGETS[kind]
    target = TARGETS[inside[1]]
    path = target.path.replace("mlp.", f"mlp.experts.local_experts.{inside[2]}.")
    return replace(target, path=path, expert=int(inside[2]))


def is_in_mlp(target: str) -> bool:
    """Whether it is inside every expert of a model of experts."""
    return TARGETS[target].path.startswith("mlp.")


def check_outside_experts(names: list[str], why: str) -> None:
    """Raise ``UsageError`` for a name that stands for an MLP.

    Args:
        why: nothing can be put on one.
    """
    for name in names:
        if any(map(is_in_mlp, expand([name]))):
            attention = [target for target in (*NAMES, *TARGETS) if target.startswith("attention")]
            raise UsageError("target_modules", name, f"{why}; use {', '.join(attention)}")


def is_gated(model: ModelConfig) -> bool:
    """Whether fc1 is a fused gate and up projection (SwiGLU and the like)."""
    return str(model.get("activation", "gelu")).endswith("glu")


def blocks(kind: str, model: ModelConfig) -> int:
    """How many matrices of equal size Megatron stacks in a kind's W and shards one by one."""
    return 2 if _target(kind) == "mlp_fc1" and is_gated(model) else 1


def _target(kind: str) -> str:
    inside = IN_EXPERT.fullmatch(kind)
    return inside[1] if inside else kind


def _ffn(kind: str, model: ModelConfig) -> int:
    """The width inside the MLP or the expert that a kind is in."""
    return (model.get("moe_ffn_hidden_size") if IN_EXPERT.fullmatch(kind) else None) or model.ffn_hidden_size


def shape(kind: str, model: ModelConfig) -> tuple[int, int]:
    """Whole (in_features, out_features) of a kind, from a NeMo GPT's model config.

    Raises:
        UsageError: the gate or up projection of a model that has none.
    """
    hidden, ffn, heads = model.hidden_size, _ffn(kind, model), model.num_attention_heads
    target = _target(kind)
    head_dim = model.get("kv_channels") or hidden // heads
    groups = model.get("num_query_groups") or heads
    if TARGETS[target].part in ("gate", "up") and not is_gated(model):
        raise UsageError("target_modules", target, f"the base's activation {model.activation!r} has no gate")
    return {
        "attention_qkv": (hidden, (heads + 2 * groups) * head_dim),
        "attention_q": (hidden, heads * head_dim),
        "attention_k": (hidden, groups * head_dim),
        "attention_v": (hidden, groups * head_dim),
        "attention_dense": (heads * head_dim, hidden),
        "mlp_fc1": (hidden, 2 * ffn if is_gated(model) else ffn),
        "mlp_gate": (hidden, ffn),
        "mlp_up": (hidden, ffn),
        "mlp_fc2": (ffn, hidden),
    }[target]


def rows(kind: str, model: ModelConfig, ranks: int = 1):
    """Which rows of the fused projection's local W a kind addresses, as indices (out,); None means all.

    Megatron stores QKV by query group: the group's queries, then its key, then its value; and gate before up.
    """
    import torch

    part = where(kind).part
    if part is None:
        return None
    if part in ("gate", "up"):
        half = _ffn(kind, model) // ranks
        return torch.arange(half) + (half if part == "up" else 0)
    heads = model.num_attention_heads
    head_dim = model.get("kv_channels") or model.hidden_size // heads
    groups = model.get("num_query_groups") or heads
    per_group = heads // groups
    fused = torch.arange((heads + 2 * groups) * head_dim // ranks).view(groups // ranks, per_group + 2, head_dim)
    return {"q": fused[:, :per_group], "k": fused[:, per_group], "v": fused[:, per_group + 1]}[part].reshape(-1)


def places(targets: tuple[str, ...], model: ModelConfig):
    """The rows of the whole W that targets inside one projection address, one below the other, as indices (rows,)."""
    import torch

    found = [(target, rows(target, model)) for target in targets]
    return torch.cat([torch.arange(shape(target, model)[1]) if own is None else own for target, own in found])


def order(wanted: tuple[str, ...], given: tuple[str, ...], model: ModelConfig):
    """The rows that ``wanted`` addresses as indices into those of ``given``, where both address the same rows."""
    return places(given, model).argsort()[places(wanted, model).argsort().argsort()]


def whole(path: str) -> str:
    """The kind that is all of the linear layer at a path below a transformer layer."""
    inside = EXPERT.match(path)
    outside = f"mlp.{path[inside.end() :]}" if inside else path
    target = next(name for name, target in TARGETS.items() if target.path == outside and target.part is None)
    return f"{target}_expert_{inside[1]}" if inside else target
