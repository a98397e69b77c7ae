"""The linear layers an adapter can sit on, by the names NeMo's configs use."""

from dataclasses import dataclass

from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.model.data import ModelConfig


@dataclass(frozen=True)
class Target:
    """Where a kind of linear layer is and how Megatron shards it.

    Args:
        path: its path below a Megatron-core ``TransformerLayer``.
        parallel: ``column`` (rows of W, so ``out``, are sharded) or ``row`` (``in`` is).
        part: the matrix inside a fused projection that it addresses; None is the whole.
    """

    path: str
    parallel: str
    part: str | None = None


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
)
#: Those of them that may be null.
OPTIONAL_FIELDS = ("num_query_groups", "kv_channels", "num_moe_experts")

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


def check_experts(names: list[str], model: ModelConfig) -> None:
    """Raise ``UsageError`` for a name that stands for an MLP, of a model that has experts instead.

    Experts' layers see other tokens in every step, and are sharded and stored in other ways than all others: no method
    here works inside them.
    """
    experts = model.get("num_moe_experts")
    for name in names if experts else ():
        if any(TARGETS[target].path.startswith("mlp.") for target in expand([name])):
            way_out = (
                f"the base has {experts} experts (num_moe_experts) instead of an MLP, and adapters go on its attention "
                "only: attention, attention_qkv, attention_q, attention_k, attention_v, attention_dense"
            )
            raise UsageError("target_modules", name, way_out)


def is_gated(model: ModelConfig) -> bool:
    """Whether fc1 is a fused gate and up projection (SwiGLU and the like)."""
    return str(model.get("activation", "gelu")).endswith("glu")


def blocks(target: str, model: ModelConfig) -> int:
    """How many matrices of equal size Megatron stacks in a target's W and shards one by one."""
    return 2 if target == "mlp_fc1" and is_gated(model) else 1


def shape(target: str, model: ModelConfig) -> tuple[int, int]:
    """Whole (in_features, out_features) of a target, from a NeMo GPT's model config.

    Raises:
        UsageError: the gate or up projection of a model that has none.
    """
    hidden, ffn, heads = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads
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


def rows(target: str, model: ModelConfig, ranks: int = 1):
    """Which rows of the fused projection's local W a target addresses, as indices (out,); None means all.

    Megatron stores QKV by query group: the group's queries, then its key, then its value; and gate before up.
    """
    import torch

    part = TARGETS[target].part
    if part is None:
        return None
    if part in ("gate", "up"):
        half = model.ffn_hidden_size // ranks
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
    """The target that is all of the linear layer at a path below a transformer layer."""
    return next(target for target, where in TARGETS.items() if where.path == path and where.part is None)
