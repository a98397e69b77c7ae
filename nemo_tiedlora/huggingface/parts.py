"""Which tensors of a transformers model each tensor of a base is made of, and the way between them, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from nemo_tiedlora.huggingface.modules import Modules
from nemo_tiedlora.model.data import ModelConfig
from nemo_tiedlora.model.targets import TARGETS, rows, shape, whole

if TYPE_CHECKING:
    from torch import Tensor


class Source(NamedTuple):
    """A tensor of a transformers model, all of which is in one of the base's.

    Args:
        shape: as transformers has it.
        targets: whose rows of the base's it has, one below the other. None: it is the base's, whose vocabulary may have
            more rows.
        transposed: its rows are columns there.
    """

    name: str
    shape: tuple[int, ...]
    targets: tuple[str, ...] = ()
    transposed: bool = False


class Part(NamedTuple):
    """A tensor of the base and what it is made of.

    Args:
        name: as in a checkpoint, where layers are stacked. layer: 0-based; None where there are none.
        shape: without the axis of layers.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    sources: tuple[Source, ...]


def parts(modules: Modules, model: ModelConfig, vocabulary: int, words: int) -> Iterator[Part]:
    """All tensors of a base.

    Args:
        modules: of the transformers model's family.
        model: the base's config.
        vocabulary: rows of the transformers model's embedding. words: rows of the base's.
    """
    hidden = model.hidden_size
    kinds = ("weight", "bias") if model.get("normalization", "layernorm") == "layernorm" else ("weight",)

    def as_it_is(name: str, layer: int | None, source: str, *sizes: int) -> Part:
        return Part(name, layer, sizes, (Source(source, sizes),))

    def embedding(name: str, source: str) -> Part:
        return Part(name, None, (words, hidden), (Source(source, (vocabulary, hidden)),))

    yield embedding("embedding.word_embeddings.weight", f"{modules.words}.weight")
    if modules.positions:
        positions = "embedding.position_embeddings.weight"
        yield as_it_is(positions, None, f"{modules.positions}.weight", model.encoder_seq_length, hidden)
    for layer in range(model.num_layers):
        inside, new = f"{modules.layers}.{layer}", "decoder.layers"
        # Megatron-core keeps a norm's tensors under the linear layer that follows it.
        norms = dict(zip(("self_attention.linear_qkv", "mlp.linear_fc1"), modules.norms, strict=True))
        for path, found in groupby(modules.linear, lambda module: TARGETS[module.parts[0]].path):
            linear = list(found)
            if path in norms:
                for kind in kinds:
                    yield as_it_is(f"{new}.{path}.layer_norm_{kind}", layer, f"{inside}.{norms[path]}.{kind}", hidden)
            width, height = shape(whole(path), model)
            yield Part(f"{new}.{path}.weight", layer, (height, width), tuple(
                Source(
                    f"{inside}.{module.name}.weight",
                    (width, _height(module.parts, model)) if modules.transposed else
                    (_height(module.parts, model), width),
                    module.parts,
                    modules.transposed,
                )
                for module in linear
            ))  # fmt: skip
            if model.get("bias", True) or (model.get("qkv_bias") and path == "self_attention.linear_qkv"):
                yield Part(f"{new}.{path}.bias", layer, (height,), tuple(
                    Source(f"{inside}.{module.name}.bias", (_height(module.parts, model),), module.parts)
                    for module in linear
                ))  # fmt: skip
        if model.get("qk_layernorm"):
            for one in "qk":
                name, source = f"{new}.self_attention.{one}_layernorm.weight", f"{inside}.self_attn.{one}_norm.weight"
                yield as_it_is(name, layer, source, model.get("kv_channels") or hidden // model.num_attention_heads)
    for kind in kinds:
        yield as_it_is(f"decoder.final_layernorm.{kind}", None, f"{modules.last_norm}.{kind}", hidden)
    if not model.get("share_embeddings_and_output_weights", True):
        yield embedding("output_layer.weight", "lm_head.weight")


def fill(made: Tensor, source: Source, tensor: Tensor, model: ModelConfig) -> None:
    """Put a transformers model's tensor into the base's."""
    tensor = tensor.T if source.transposed else tensor
    start = 0
    for target in source.targets:
        end = start + _height((target,), model)
        inside = rows(target, model)
        made[slice(None) if inside is None else inside] = tensor[start:end]
        start = end
    if not source.targets:
        made[: len(tensor)] = tensor


def taken(tensor: Tensor, source: Source, model: ModelConfig) -> Tensor:
    """A transformers model's tensor out of the base's."""
    import torch

    if not source.targets:
        return tensor[: source.shape[0]]
    if len(source.targets) == 1 and rows(source.targets[0], model) is None:
        return tensor.T if source.transposed else tensor
    made = tensor.new_empty(source.shape)
    by_row = made.T if source.transposed else made
    start = 0
    for target in source.targets:
        end = start + _height((target,), model)
        torch.index_select(tensor, 0, rows(target, model), out=by_row[start:end])
        start = end
    return made


def _height(targets: tuple[str, ...], model: ModelConfig) -> int:
    return sum(shape(target, model)[1] for target in targets)
