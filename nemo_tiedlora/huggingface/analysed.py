"""A model in a folder that transformers saved, run by transformers to be looked into; NeMo is not needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from nemo_tiedlora.analysis.host import AdaptedLayer
from nemo_tiedlora.analysis.layers import similarity_matrix
from nemo_tiedlora.attach.placed import Place, PlacedWeight, sizes
from nemo_tiedlora.checkpoint import Adapter, Base, read
from nemo_tiedlora.checkpoint.adapter import Blueprint
from nemo_tiedlora.console import progress
from nemo_tiedlora.errors import UsageError, first_line
from nemo_tiedlora.files import content_of
from nemo_tiedlora.huggingface.families import CONFIG, read_config
from nemo_tiedlora.huggingface.held import HeldBase, checksums_of
from nemo_tiedlora.huggingface.placing import ALL, Known, by_kind, found, known, place
from nemo_tiedlora.huggingface.quiet import quiet
from nemo_tiedlora.huggingface.weights import DTYPES, weight_files
from nemo_tiedlora.model.config import check_shape
from nemo_tiedlora.model.sizes import Sizes
from nemo_tiedlora.model.sizes import sizes as sizes_of
from nemo_tiedlora.model.targets import KINDS
from nemo_tiedlora.model.tokenizer import TOKENIZER
from nemo_tiedlora.variants import SharedConfig, Site


class _Fitting(NamedTuple):
    """An adapter, where its layers are in the model, and how they are called if NeMo runs such models too."""

    adapter: Adapter
    places: list[Place]
    known: Known | None


class SavedModel:
    """A model in a folder that transformers saved; see ``AnalysedBase``.

    Raises:
        UsageError: its class is none of transformers', or its weights are pickled or not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        named = read_config(folder, field="base").get("architectures")
        name = named[0] if isinstance(named, list) and len(named) == 1 else None
        self.kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if not (isinstance(self.kind, type) and issubclass(self.kind, transformers.PreTrainedModel)):
            raise self._error(f"its {CONFIG} has architectures={named!r}, which is no class of a model of transformers")
        try:
            self.files = weight_files(folder)
        except UsageError as error:
            raise self._error(error.way_out) from None
        self._fitting: dict[Path, _Fitting] = {}

    def _error(self, reason: str) -> UsageError:
        return UsageError("base", str(self.folder), reason)

    @cached_property
    def model(self) -> nn.Module:
        """With its weights, in their own type."""
        with quiet():
            try:
                model, facts = self.kind.from_pretrained(
                    self.folder, torch_dtype="auto", use_safetensors=True, local_files_only=True,
                    output_loading_info=True,
                )  # fmt: skip
            except Exception as error:  # whatever transformers and what is below it make of a damaged file
                raise self._error(f"transformers cannot load it ({first_line(error)})") from None
        if missing := facts["missing_keys"]:
            raise self._error(f"the tensor {missing[0]} is missing")
        return model.eval().requires_grad_(False)

    @property
    def targets(self) -> list[str]:
        return ["attention_qkv"] if self._known() else [ALL]

    def _known(self) -> Known | None:
        try:
            return known(self.model)
        except UsageError:  # of a family, with a setting that makes another model of it
            return None

    def sizes(self, config: SharedConfig) -> Sizes:
        where = found(self.model, config.target_modules, config)
        sites = [place.site for place in where.places]
        base = Base.of(where.known.shape) if where.known else Base.of_sites(sites, where.layers, {})
        shape = Blueprint(config.scheme, {}, base).shape
        return sizes_of(replace(config, target_modules=where.targets), shape)

    def similarity(self, texts: Sequence[str], length: int, kind: str) -> list[list[float]]:
        return similarity_matrix(progress(self.layer_outputs(texts, length), "calibrating", len(texts)), kind)

    @torch.no_grad()
    def layer_outputs(self, texts: Sequence[str], length: int) -> Iterator[Tensor]:
        """For each text, every layer's output at the last token, computed in float32: (layers, hidden).

        Encoders get their special tokens, so that the last one is the text's end; decoders the text as it stands.

        Raises:
            UsageError: the model has several stacks of layers, needs more than text, or cannot take so many tokens.
        """
        if self.model.config.is_encoder_decoder:
            raise self._error("an encoder and a decoder: their layers see different texts and cannot be compared")
        model, tokenizer = self.model.float(), self._tokenizer()
        encoder = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        outputs: dict[str, list[Tensor]] = {}

        def keep(name: str, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            outputs.setdefault(name, []).append(hidden[0, -1])

        hooks = [
            layer.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
            for name, layers in _stacks(model).items()
            for layer in layers
        ]
        try:
            for text in texts:
                ids = tokenizer(text, add_special_tokens=encoder, truncation=True, max_length=length)["input_ids"]
                if not ids:
                    continue
                outputs.clear()
                try:
                    with quiet():
                        model(input_ids=torch.tensor([ids]))
                except (IndexError, RuntimeError) as error:
                    way_out = f"the model cannot take {len(ids)} tokens ({first_line(error)}); name fewer"
                    raise UsageError("length", length, way_out) from None
                except (TypeError, ValueError) as error:
                    reason = f"a {type(model).__name__} cannot be run on a text alone ({first_line(error)})"
                    raise self._error(reason) from None
                if len(outputs) != 1:
                    stacks = ", ".join(outputs) or "none"
                    raise self._error(
                        f"a text must go through one stack of layers; those that it goes through: {stacks}"
                    )
                yield torch.stack(*outputs.values())
        finally:
            for hook in hooks:
                hook.remove()

    def _tokenizer(self) -> Any:
        """Transformers' own class for ``tokenizer.json``, whatever the folder names."""
        if not (self.folder / TOKENIZER).is_file():
            way_out = f"there is no {TOKENIZER} in it; load the tokenizer with transformers (use_fast=True) and save it"
            raise self._error(f"{way_out} there with save_pretrained")
        with quiet():
            try:
                return transformers.PreTrainedTokenizerFast.from_pretrained(self.folder, local_files_only=True)
            except Exception as error:  # tokenizers has no class of its own for what it refuses
                raise self._error(f"its {TOKENIZER} cannot be loaded ({first_line(error)})") from None

    def check(self, adapter: Path, field: str) -> None:
        self._fitting[adapter] = self._fit(adapter, field)

    @torch.no_grad()
    def adapted(self, adapter: Path) -> dict[Site, AdaptedLayer]:
        if adapter not in self._fitting:
            self.check(adapter, "adapter")
        loaded, places, _ = self._fitting[adapter]
        tensors = {key: tensor.float() for key, tensor in loaded.tensors.items()} | loaded.drawn()
        layers = {}
        for one in places:
            weight = PlacedWeight(one)
            if not weight(torch.float32).isfinite().all():
                raise self._error(f"the weight of {one.spans[0].name} has NaN or infinity in it")
            specs = loaded.variant.tensors(one.site)
            factors = loaded.variant.factors(one.site, {name: tensors[specs[name].key] for name in specs}, weight)
            layers[one.site] = AdaptedLayer(factors.folded().detached(), weight)
        return dict(sorted(layers.items(), key=lambda item: (item[0].target, item[0].layer)))

    def _fit(self, path: Path, field: str) -> _Fitting:
        """The adapter at ``path``, once it is known that it was trained on these weights.

        Raises:
            UsageError: it is damaged, or for another base.
        """
        adapter = read(path, field)
        if KINDS in adapter.shape:
            fitting = _Fitting(adapter, self._again(adapter, path, field), None)
        else:
            family = self._known()
            if not family:
                way_out = f"made for a model that NeMo runs; the base is a {type(self.model).__name__}"
                raise UsageError(field, str(path), way_out)
            check_shape(adapter.shape, family.shape, field, path)
            fitting = _Fitting(adapter, [place(self.model, site, family) for site in adapter.sites], family)
        self._check_weights(fitting, path, field)
        return fitting

    def _again(self, adapter: Adapter, path: Path, field: str) -> list[Place]:
        """The adapter's layers, under their names in a model for a task or in the model inside it."""
        inside = nn.Module()
        inside.add_module(self.model.base_model_prefix or "model", self.model)
        for model in (self.model, inside, self.model.base_model):
            linear = {name: module for name, module in model.named_modules() if sizes(module)}
            here = {one.site: one for one in by_kind(linear).values()}
            if all(site in here for site in adapter.sites):
                return [here[site] for site in adapter.sites]
        first = adapter.sites[0]
        what = f"with {first.target} ({first.out_features} x {first.in_features}) in {len(adapter.sites)} layers"
        raise UsageError(
            field, str(path), f"made for another base: a model {what}, which a {self.kind.__name__} has not"
        )

    def _check_weights(self, fitting: _Fitting, path: Path, field: str) -> None:
        """The adapter can have been trained on a copy of the weights in another type."""
        recorded = fitting.adapter.base.checksums
        own = next(self.model.parameters()).dtype
        for dtype in dict.fromkeys([own, *(getattr(torch, name) for name in DTYPES.values())]):
            if not recorded or self._checksums(fitting, dtype) == recorded:
                return
        raise UsageError(field, str(path), f"trained on other weights than those in {self.folder}")

    def _checksums(self, fitting: _Fitting, dtype: torch.dtype) -> dict[str, str]:
        if fitting.known:
            return HeldBase(self.model, fitting.known, dtype).checksums(fitting.adapter.paths)
        return checksums_of(fitting.places, dtype)

    def sha256(self) -> str:
        contents = [content_of(path) for path in self.files]
        return contents[0] if len(contents) == 1 else hashlib.sha256(" ".join(contents).encode()).hexdigest()


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of layers by name, the outermost ones: all that is in them has linear layers inside."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{outer}." for outer in stacks)):
            if all(not sizes(layer) and any(map(sizes, layer.modules())) for layer in module):
                stacks[name] = module
    return stacks
