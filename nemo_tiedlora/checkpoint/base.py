"""The linear layers' weights of a base ``.nemo``, one at a time and whole, however the file is sharded; without NeMo.

Two kinds of file are read: a distributed checkpoint (``model_weights/`` of the ``torch_dist`` backend), and a single
``model_weights.ckpt``. Before anything else, everything in them that NeMo would unpickle is looked at.
"""

import hashlib
import io
import pickle
import re
import shutil
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_tiedlora.checkpoint import pickles
from nemo_tiedlora.checkpoint.pieces import Pieces
from nemo_tiedlora.console import progress
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import replacing
from nemo_tiedlora.model.archive import Appended, Archive, entry, growing, opened
from nemo_tiedlora.model.config import MODEL_CONFIG, config_as_it_is, read_model_config
from nemo_tiedlora.model.targets import TARGETS, shape

FOLDER = "model_weights/"
METADATA = f"{FOLDER}.metadata"
SINGLE = "model_weights.ckpt"
#: ``decoder.layers.<layer>.<path>.weight``; a distributed checkpoint may stack layers, and then names none.
WEIGHT = re.compile(r"(?:model\.)?(?:module\.)?decoder\.layers\.(?:(\d+)\.)?(\w+\.linear_\w+)\.weight")
#: What reading a list of pieces ends in that was made up.
WRONG = (KeyError, AttributeError, StopIteration, ValueError, TypeError, IndexError)

#: Takes a weight's path, its 0-based layer and the weight (out, in) to what is to be written in its place.
Change = Callable[[str, int, Tensor], Tensor]


class BaseFile(ABC):
    """An open base.

    Attributes:
        config: its ``model_config.yaml``.
    """

    def __init__(self, archive: Archive):
        self.archive = archive
        self.config: DictConfig = read_model_config(archive, whole=True)

    def _check_shapes(self, shapes: dict[tuple[str, int], tuple[int, ...]]) -> None:
        """Its weights, (out, in) by path and layer, are those of a model of the sizes that its config says."""
        known = {where.path: target for target, where in TARGETS.items() if where.part is None}
        paths = {path for path, _ in shapes if path in known}
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
    def weight(self, path: str, layer: int) -> Tensor:
        """The whole weight (out, in) of one linear layer, in the file's dtype.

        Args:
            path: below a transformer layer, e.g. ``self_attention.linear_qkv``.
            layer: 0-based.
        """

    @abstractmethod
    def _write_weights(self, tar: tarfile.TarFile, paths: list[str], change: Change) -> set[str]:
        """Write the weights into ``tar``; return the names of the members that are done with."""

    def write(self, out: Path, config: DictConfig, paths: list[str], change: Change) -> None:
        """Write a copy of the base with other weights in its linear layers.

        Args:
            config: its ``model_config.yaml``.
            paths: the kinds of linear layer that ``change`` is called for.
            change: must give a weight of the same shape and dtype; may be called several times for one layer.
        """
        text = OmegaConf.to_yaml(config).encode()
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
        layers = range(self.config.num_layers)
        steps = [(path, layer) for path in paths for layer in layers]
        digests = {path: hashlib.sha256() for path in paths}
        for path, layer in progress(steps, "base checksum", len(steps)):
            weight = self.weight(path, layer)
            size = "x".join(map(str, weight.shape))
            digests[path].update(f"{path}.weight {layer} {size} {str(weight.dtype).removeprefix('torch.')}\n".encode())
            digests[path].update(weight.contiguous().view(-1).view(torch.uint8).numpy().data)
        return {path: digest.hexdigest() for path, digest in digests.items()}


class _Piece(NamedTuple):
    """Where some rows and columns of a weight are stored."""

    index: Any
    plane: int | None
    rows: slice
    columns: slice


class _Distributed(BaseFile):
    """Pieces of tensors, saved one by one into ``.distcp`` files, and a list of them."""

    def __init__(self, archive: Archive):
        super().__init__(archive)
        self.checked = Pieces(archive, FOLDER)
        self.checked.check()
        self.metadata = self.checked.metadata
        self.storage = self.metadata.storage_data
        self.pieces: dict[tuple[str, int], list[_Piece]] = {}
        self.shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        self.weights_in: dict[Any, list[tuple[str, int, _Piece]]] = {}
        for index in self.storage:
            named = WEIGHT.fullmatch(index.fqn)
            if named:
                self._note(index, named[2], named[1])
        self._check_shapes(self.shapes)

    def _note(self, index: Any, path: str, layer: str | None) -> None:
        saved = self.metadata.state_dict_metadata[index.fqn]
        if not isinstance(saved, TensorStorageMetadata):
            raise self.archive.error(f"{index.fqn} in it is not a tensor")
        chunk = next(chunk for chunk in saved.chunks if chunk.offsets == index.offset)
        *layers, rows, columns = (slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        planes = range(layers[0].start, layers[0].stop) if layers else [int(layer or 0)]
        if planes[-1] >= self.config.num_layers:
            raise self.archive.error(f"{index.fqn} is of layer {planes[-1]}; there are {self.config.num_layers}")
        for plane, number in enumerate(planes):
            self.shapes[path, number] = tuple(saved.size[-2:])
            piece = _Piece(index, plane if layers else None, rows, columns)
            self.pieces.setdefault((path, number), []).append(piece)
            self.weights_in.setdefault(index, []).append((path, number, piece))

    def weight(self, path: str, layer: int) -> Tensor:
        if (path, layer) not in self.pieces:
            raise self.archive.error(f"there is no {path} of layer {layer} in it")
        weight: Tensor | None = None
        for piece in self.pieces[path, layer]:
            tensor = self._load(piece.index)
            if piece.plane is not None:
                tensor = tensor[piece.plane]
            if weight is None:
                weight = tensor.new_empty(self.shapes[path, layer])
            weight[piece.rows, piece.columns] = tensor
        assert weight is not None  # no weight is listed without a piece
        return weight

    def _load(self, index: Any) -> Tensor:
        try:
            return pickles.load(io.BytesIO(self.checked.bytes(index)))
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
                            place = tensor if piece.plane is None else tensor[piece.plane]
                            place.copy_(changed(path, layer)[piece.rows, piece.columns])
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
        self.keys = {}
        for key in self.state:
            named = WEIGHT.fullmatch(key)
            if named and named[1]:
                self.keys[named[2], int(named[1])] = key
        self._check_shapes({place: self.state[key].shape for place, key in self.keys.items()})

    def weight(self, path: str, layer: int) -> Tensor:
        if (path, layer) not in self.keys:
            raise self.archive.error(f"there is no {path} of layer {layer} in it")
        return self.state[self.keys[path, layer]]

    def _write_weights(self, tar: tarfile.TarFile, paths: list[str], change: Change) -> set[str]:
        weights = {place: key for place, key in self.keys.items() if place[0] in paths}
        for place, key in progress(weights.items(), "writing", len(weights)):
            self.state[key].copy_(change(*place, self.state[key]))  # the pages changed are this process's own
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


def check_base(path: Path, field: str) -> DictConfig:
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
