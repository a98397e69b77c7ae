"""The tensors of a base ``.nemo``, one at a time and whole, however the file is sharded; without NeMo.

Two kinds of file are read: a distributed checkpoint (``model_weights/`` of the ``torch_dist`` backend), and a single
``model_weights.ckpt``. Before anything else, everything in them that NeMo would unpickle is looked at.
"""

import hashlib
import io
import math
import pickle
import re
import shutil
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_tiedlora.checkpoint import pickles
from nemo_tiedlora.checkpoint.pieces import Pieces
from nemo_tiedlora.console import progress
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import replacing
from nemo_tiedlora.model.archive import Appended, Archive, entry, growing, opened
from nemo_tiedlora.model.config import MODEL_CONFIG, config_as_it_is, read_model_config
from nemo_tiedlora.model.data import ModelConfig, dump
from nemo_tiedlora.model.targets import EXPERT, TARGETS, shape, whole

FOLDER = "model_weights/"
METADATA = f"{FOLDER}.metadata"
SINGLE = "model_weights.ckpt"
#: What a tensor's name in a checkpoint begins with, if it is the model's and not, say, the optimizer's.
MODEL = re.compile(r"(?:model\.)?(?:module\.)?(?=(?:decoder|embedding|output_layer)\.)|model\.(?:module\.)?")
#: Tensors of layers, which may be named without their number: then they are stacked.
LAYERS = "decoder.layers."
NUMBERED = re.compile(rf"{re.escape(LAYERS)}(\d+)\.")
WEIGHT = re.compile(rf"{re.escape(LAYERS)}((?:\w+\.|{EXPERT.pattern})linear_\w+)\.weight")
#: Tensors of a layer's experts, stacked too, and the same of each expert.
EXPERTS = f"{LAYERS}mlp.experts.experts."
EXPERT_NUMBERED = f"{LAYERS}mlp.experts.local_experts.{{}}."
#: What megatron-core's own layers call their norms, and under which names a distributed checkpoint has them.
NORMS = {
    f"{LAYERS}input_layernorm.": f"{LAYERS}self_attention.linear_qkv.layer_norm_",
    f"{LAYERS}pre_mlp_layernorm.": f"{LAYERS}mlp.linear_fc1.layer_norm_",
}
#: What reading a list of pieces ends in that was made up.
WRONG = (KeyError, AttributeError, StopIteration, ValueError, TypeError, IndexError)

#: Takes a weight's path, its 0-based layer and the weight (out, in) to what is to be written in its place.
Change = Callable[[str, int, Tensor], Tensor]


class Place(NamedTuple):
    """A tensor of the model.

    Args:
        name: such as ``decoder.layers.mlp.linear_fc2.weight``. layer: 0-based; None where there are none.
    """

    name: str
    layer: int | None = None


class Saved(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _place(key: str) -> Place | None:
    """The tensor of the model that is saved under ``key``, if any; without a layer, it may be of several of them."""
    begin = MODEL.match(key)
    if not begin or "_extra_state" in key:
        return None
    name = key[begin.end() :]
    numbered = NUMBERED.match(name)
    if numbered:
        name = f"{LAYERS}{name[numbered.end() :]}"
    for local, kept in NORMS.items():
        if name.startswith(local):
            name = kept + name.removeprefix(local)
    return Place(name, int(numbered[1]) if numbered else None)


class BaseFile(ABC):
    """An open base.

    Attributes:
        config: its ``model_config.yaml``.
        saved: all of the model's tensors.
    """

    saved: dict[Place, Saved]

    def __init__(self, archive: Archive):
        self.archive = archive
        self.config: ModelConfig = read_model_config(archive, whole=True)

    def _check_shapes(self) -> None:
        """Its weights, (out, in) by path and layer, are those of a model of the sizes that its config says."""
        shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        for (name, number), saved in self.saved.items():
            weight = WEIGHT.fullmatch(name)
            if weight and number is not None:
                shapes[weight[1], number] = saved.shape
        outside = {target.path for target in TARGETS.values()}
        known = {path: whole(path) for path, _ in shapes if path in outside or EXPERT.match(path)}
        paths = set(known)
        if not paths:
            raise self.archive.error("there are no weights of a transformer's layers in it")
        for path, layer in shapes:
            expected = shape(known[path], self.config)[::-1] if path in known else tuple(shapes[path, layer])
            if tuple(shapes[path, layer]) != expected:
                sizes = f"{tuple(shapes[path, layer])}; its {MODEL_CONFIG} says {expected}"
                raise self.archive.error(f"{path} of layer {layer} in it has shape {sizes}")
        for path in paths:
            layers = sum(path == found for found, _ in shapes)
            if layers != self.config.num_layers or max(layer for found, layer in shapes if found == path) >= layers:
                raise self.archive.error(
                    f"{path} is there for {layers} layers; its {MODEL_CONFIG} says {self.config.num_layers}"
                )

    @abstractmethod
    def tensor(self, place: Place) -> Tensor:
        """One whole tensor of the model, in the file's dtype.

        Raises:
            UsageError: it is not there.
        """

    def weight(self, path: str, layer: int) -> Tensor:
        """The whole weight (out, in) of one linear layer, in the file's dtype.

        Args:
            path: below a transformer layer, e.g. ``self_attention.linear_qkv``.
            layer: 0-based.
        """
        return self.tensor(Place(f"{LAYERS}{path}.weight", layer))

    def _missing(self, place: Place) -> UsageError:
        layer = "" if place.layer is None else f" of layer {place.layer}"
        return self.archive.error(f"there is no {place.name}{layer} in it")

    @abstractmethod
    def _write_weights(self, tar: tarfile.TarFile, paths: list[str], change: Change) -> set[str]:
        """Write the weights into ``tar``; return the names of the members that are done with."""

    def write(self, out: Path, config: Mapping[str, Any], paths: list[str], change: Change) -> None:
        """Write a copy of the base with other weights in its linear layers.

        Args:
            config: its ``model_config.yaml``.
            paths: the kinds of linear layer that ``change`` is called for.
            change: must give a weight of the same shape and dtype; may be called several times for one layer.
        """
        text = dump(config).encode()
        with replacing(out) as unfinished, tarfile.open(unfinished, "w", format=tarfile.GNU_FORMAT) as tar:
            tar.addfile(entry(MODEL_CONFIG, len(text)), io.BytesIO(text))
            done = {MODEL_CONFIG} | self._write_weights(tar, paths, change)
            for name, member in self.archive.members.items():
                if name not in done:
                    tar.addfile(entry(name, member.size), self.archive.open(name))

    def checksums(self, paths: list[str]) -> dict[str, str]:
        """SHA-256 of the weights of each kind of linear layer, by path.

        Of the layers in order: a line ``<path>.weight <layer> <out>x<in> <dtype>`` and then the weight's bytes, row by
        row, little-endian. It says nothing of how the file is packed or sharded, and needs one weight in memory.
        """
        return checksums({path: range(self.config.num_layers) for path in paths}, self.weight)


def checksums(layers: Mapping[str, Iterable[int]], weight: Callable[[str, int], Tensor]) -> dict[str, str]:
    """As ``BaseFile.checksums``, of whatever gives the ``weight`` (out, in) at a path of one of its ``layers``."""
    steps = [(path, layer) for path, numbers in layers.items() for layer in numbers]
    digests = {path: hashlib.sha256() for path in layers}
    for path, layer in progress(steps, "base checksum", len(steps)):
        found = weight(path, layer)
        size = "x".join(map(str, found.shape))
        digests[path].update(f"{path}.weight {layer} {size} {str(found.dtype).removeprefix('torch.')}\n".encode())
        digests[path].update(found.contiguous().view(-1).view(torch.uint8).numpy().data)
    return {path: digest.hexdigest() for path, digest in digests.items()}


class _Piece(NamedTuple):
    """Where a part of a tensor is stored: in a tensor of these sizes, whose first dimensions may be layers and experts.

    ``plane`` is the tensor's place in those.
    """

    index: Any
    sizes: tuple[int, ...]
    plane: tuple[int, ...]
    part: tuple[slice, ...]


class _Distributed(BaseFile):
    """Pieces of tensors, saved one by one into ``.distcp`` files, and a list of them."""

    def __init__(self, archive: Archive):
        super().__init__(archive)
        self.checked = Pieces(archive, FOLDER)
        self.checked.check()
        self.metadata = self.checked.metadata
        self.storage = self.metadata.storage_data
        self.saved = {}
        self.pieces: dict[Place, list[_Piece]] = {}
        self.weights_in: dict[Any, list[tuple[str, int, _Piece]]] = {}
        for index in self.storage:
            place = _place(index.fqn)
            if place:
                self._note(index, place)
        self._check_shapes()
        for place, pieces in self.pieces.items():
            found = sum(math.prod(one.stop - one.start for one in piece.part) for piece in pieces)
            if found != math.prod(self.saved[place].shape):
                raise self.archive.error(f"not all of {place.name} is in it")

    def _note(self, index: Any, place: Place) -> None:
        saved = self.metadata.state_dict_metadata[index.fqn]
        weight = WEIGHT.fullmatch(place.name)
        if not isinstance(saved, TensorStorageMetadata):
            if weight:
                raise self.archive.error(f"{index.fqn} in it is not a tensor")
            return
        chunk = next(chunk for chunk in saved.chunks if chunk.offsets == index.offset)
        part = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        layers = self.config.num_layers
        planes: dict[tuple[int, ...], Place] = {(): place}
        stacked = 0
        if place.name.startswith(LAYERS) and place.layer is None:
            numbers = self._numbers(index.fqn, part[stacked], "layer", layers)
            planes = {(plane,): Place(place.name, number) for plane, number in enumerate(numbers)}
            stacked += 1
        elif place.layer is not None and place.layer >= layers:
            raise self.archive.error(f"{index.fqn} is of layer {place.layer}; there are {layers}")
        if place.name.startswith(EXPERTS):
            numbers = self._numbers(index.fqn, part[stacked], "expert", self.config.get("num_moe_experts") or 0)
            below = place.name.removeprefix(EXPERTS)
            planes = {
                (*plane, within): Place(EXPERT_NUMBERED.format(number) + below, layer)
                for plane, (_, layer) in planes.items()
                for within, number in enumerate(numbers)
            }
            stacked += 1
        for plane, found in planes.items():
            self.saved[found] = Saved(tuple(saved.size)[stacked:], saved.properties.dtype)
            piece = _Piece(index, tuple(chunk.sizes), plane, part[stacked:])
            self.pieces.setdefault(found, []).append(piece)
            weight = WEIGHT.fullmatch(found.name)
            if weight and found.layer is not None:
                self.weights_in.setdefault(index, []).append((weight[1], found.layer, piece))

    def _numbers(self, name: str, part: slice, what: str, most: int) -> range:
        """Of which layers or experts a part of a stacked tensor is."""
        if part.stop > most:
            raise self.archive.error(f"{name} is of {what} {part.stop - 1}; there are {most}")
        return range(part.start, part.stop)

    def tensor(self, place: Place) -> Tensor:
        if place not in self.pieces:
            raise self._missing(place)
        (shape, dtype), tensor = self.saved[place], None
        for piece in self.pieces[place]:
            stored = self._load(piece.index)
            if not isinstance(stored, Tensor) or (tuple(stored.shape), stored.dtype) != (piece.sizes, dtype):
                raise self.archive.error(f"{piece.index.fqn} in it is not of the shape and type that it is listed with")
            stored = stored[piece.plane]
            if tuple(stored.shape) == shape:
                return stored
            if tensor is None:
                tensor = stored.new_empty(shape)
            tensor[piece.part] = stored
        assert tensor is not None  # none is listed without a piece
        return tensor

    def _load(self, index: Any) -> Tensor:
        try:
            with self.checked.open(index) as file:
                return pickles.load(file)  # type: ignore[arg-type]  # torch needs no more of a file
        except pickles.Refused as error:
            raise self.archive.error(f"{index.fqn} in it: {error}") from None

    def _write_weights(self, tar: tarfile.TarFile, paths: list[str], change: Change) -> set[str]:
        latest: dict[tuple[str, int], Tensor] = {}

        def changed(path: str, layer: int) -> Tensor:
            if (path, layer) not in latest:
                latest.clear()
                latest[path, layer] = change(path, layer, self.weight(path, layer))
            return latest[path, layer]

        order = sorted(self.storage, key=lambda index: (self.storage[index].relative_path, self.storage[index].offset))
        files: dict[str, list[Any]] = {}
        for index in order:
            files.setdefault(self.storage[index].relative_path, []).append(index)
        placed = {}
        bar = iter(progress(order, "writing", len(order)))
        for name, inside in files.items():
            with growing(tar, f"model_weights/{name}") as out:
                start = out.tell()
                for index in inside:
                    next(bar)
                    weights = [weight for weight in self.weights_in.get(index, ()) if weight[0] in paths]
                    if not weights:
                        content = self.checked.bytes(index)
                    else:
                        tensor = self._load(index)
                        for path, layer, piece in weights:
                            tensor[piece.plane].copy_(changed(path, layer)[piece.part])
                        buffer = io.BytesIO()
                        torch.save(tensor, buffer)
                        content = buffer.getvalue()
                    offset = out.tell() - start
                    out.write(content)
                    placed[index] = replace(self.storage[index], offset=offset, length=len(content))
        next(bar, None)
        metadata = copy(self.metadata)
        metadata.storage_data = placed
        metadata.__dict__.pop("all_local_plans", None)
        content = pickle.dumps(metadata)
        tar.addfile(entry(METADATA, len(content)), io.BytesIO(content))
        return {METADATA, *(f"model_weights/{name}" for name in files)}


class _Single(BaseFile):
    """One ``torch.save`` file, unpacked beside the output so that only what is looked at is read into memory."""

    def __init__(self, archive: Archive, unpacked: Path):
        super().__init__(archive)
        with archive.open(SINGLE) as source, unpacked.open("wb") as file:
            shutil.copyfileobj(source, file)
        try:
            self.state = pickles.load(unpacked, mmap=True)
            if not isinstance(self.state, dict) or not all(isinstance(key, str) for key in self.state):
                raise pickles.Refused("not tensors by name")
            for key, value in self.state.items():
                if key.endswith("_extra_state"):
                    pickles.check_extra_state(value)
        except pickles.Refused as error:
            raise archive.error(f"{SINGLE} in it: {error}") from None
        self.keys: dict[Place, str] = {}
        for key, value in self.state.items():
            place = _place(key)
            if place and isinstance(value, Tensor):
                self.keys[place] = key
        self.saved = {
            place: Saved(tuple(self.state[key].shape), self.state[key].dtype) for place, key in self.keys.items()
        }
        self._check_shapes()

    def tensor(self, place: Place) -> Tensor:
        if place not in self.keys:
            raise self._missing(place)
        return self.state[self.keys[place]]

    def _write_weights(self, tar: tarfile.TarFile, paths: list[str], change: Change) -> set[str]:
        found = [(WEIGHT.fullmatch(name), layer, key) for (name, layer), key in self.keys.items() if layer is not None]
        weights = [(weight[1], layer, key) for weight, layer, key in found if weight and weight[1] in paths]
        for path, layer, key in progress(weights, "writing", len(weights)):
            self.state[key].copy_(change(path, layer, self.state[key]))  # the pages changed are this process's own
        with growing(tar, SINGLE) as out:
            torch.save(self.state, Appended(out))  # type: ignore[arg-type]  # torch needs no more of a file
        return {SINGLE}


@contextmanager
def open_base(path: Path, field: str = "base", scratch: Path | None = None) -> Iterator[BaseFile]:
    """The base at ``path``.

    Args:
        field: what messages call the path.
        scratch: a folder with room for a copy of a single-file base; by default that of temporary files.

    Raises:
        UsageError: not a base of either kind.
    """
    with opened(Path(path), field) as archive, tempfile.TemporaryDirectory(dir=scratch, prefix=".base.") as folder:
        try:
            if METADATA in archive.members:
                base: BaseFile = _Distributed(archive)
            elif SINGLE in archive.members:
                base = _Single(archive, Path(folder) / SINGLE)
            else:
                raise archive.error("there is neither a torch_dist checkpoint nor a model_weights.ckpt in it")
        except UsageError:
            raise
        except (pickle.UnpicklingError, RuntimeError, EOFError, *WRONG) as error:
            raise archive.error(f"its weights are damaged ({type(error).__name__}: {error})") from None
        yield base


def check_base(path: Path, field: str) -> ModelConfig:
    """The config of the base at ``path``, once NeMo can read all of it without running anything that is in it.

    Raises:
        UsageError: it cannot, and it is no file that the user trusts.
    """
    if pickles.is_trusted(path):
        return config_as_it_is(path, field)
    try:
        with open_base(path, field) as base:
            return base.config
    except UsageError as error:
        raise pickles.with_digest(error, path) from None
