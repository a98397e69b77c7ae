"""The linear layers an adapter can sit on, by the names NeMo's configs use."""

from dataclasses import dataclass

from omegaconf import DictConfig

from nemo_tiedlora.errors import UsageError, closest


@dataclass(frozen=True)
class Target:
    """Where a kind of linear layer is and how Megatron shards it.

    Args:
        path: its path below a Megatron-core ``TransformerLayer``.
        parallel: ``column`` (rows of W, so ``out``, are sharded) or ``row`` (``in`` is).
    """

    path: str
    parallel: str


TARGETS = {"attention_qkv": Target("self_attention.linear_qkv", "column")}


def check_targets(names: list[str]) -> None:
    """Raise ``UsageError`` for an empty list, an unknown target or one named twice."""
    if not names:
        raise UsageError("target_modules", names, f"name at least one of {', '.join(TARGETS)}")
    for name in names:
        if name not in TARGETS:
            raise UsageError("target_modules", name, closest(name, TARGETS))
    if len(set(names)) < len(names):
        raise UsageError("target_modules", names, "each target once")


def shape(target: str, model: DictConfig) -> tuple[int, int]:
    """Whole (in_features, out_features) of a target, from a NeMo GPT's model config."""
    heads = model.num_attention_heads
    head_dim = model.get("kv_channels") or model.hidden_size // heads
    groups = model.get("num_query_groups") or heads
    return {"attention_qkv": (model.hidden_size, (heads + 2 * groups) * head_dim)}[target]
