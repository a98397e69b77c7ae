"""A new base ``.nemo`` with a distributed checkpoint as NeMo saves one, written tensor by tensor; without NeMo."""

import io
import json
import pickle
import tarfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as listing
from torch.distributed.checkpoint.filesystem import _StorageInfo

from nemo_tiedlora.checkpoint.base import FOLDER, METADATA
from nemo_tiedlora.model.archive import Appended, entry, growing
from nemo_tiedlora.model.config import MODEL_CONFIG
from nemo_tiedlora.model.data import dump

#: The file that has the tensors.
PIECES = "__0_0.distcp"
#: What a distributed checkpoint in PyTorch's format says of itself.
BACKENDS = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
    "common_backend_version": 1,
}  # fmt: skip


class Piece(NamedTuple):
    """A tensor of a Megatron-core GPT under its name in a checkpoint, where layers are stacked.

    Args:
        name: such as ``decoder.layers.mlp.linear_fc2.weight``.
        tensor: all of it; or one layer's part of it, without the axis of layers.
        layer: 0-based, of a part. layers: how many there are.
    """

    name: str
    tensor: Tensor
    layer: int = 0
    layers: int | None = None


def pack(tar: tarfile.TarFile, config: dict[str, Any], files: dict[str, bytes], pieces: Iterable[Piece]) -> None:
    """Write a whole ``.nemo`` into ``tar``; with one version of PyTorch, the same bytes on every machine.

    Besides the piece that is being written nothing as large as one is kept.

    Args:
        config: its ``model_config.yaml``. files: what else is in it, by name.
        pieces: every tensor of the model, each once.
    """
    for name, content in {MODEL_CONFIG: dump(config).encode(), **files}.items():
        _add(tar, name, content)
    _add(tar, f"{FOLDER}metadata.json", json.dumps(BACKENDS).encode())
    common = io.BytesIO()
    torch.save({}, common)
    _add(tar, f"{FOLDER}common.pt", common.getvalue())
    described: dict[str, Any] = {}
    stored: dict[listing.MetadataIndex, _StorageInfo] = {}
    with growing(tar, f"{FOLDER}{PIECES}") as out:
        start = out.tell()

        def put(index: listing.MetadataIndex, content: object) -> None:
            offset = out.tell()
            torch.save(content, Appended(out))  # type: ignore[arg-type]  # torch needs no more of a file
            stored[index] = _StorageInfo(PIECES, offset - start, out.tell() - offset)

        for piece in pieces:
            tensor, name = piece.tensor, f"model.{piece.name}"
            whole = tensor.shape
            if piece.layers is not None:
                tensor, whole = tensor[None], torch.Size([piece.layers, *tensor.shape])
            chunk = listing.ChunkStorageMetadata(torch.Size([piece.layer, *[0] * (len(whole) - 1)]), tensor.shape)
            if name not in described:
                properties = listing.TensorProperties.create_from_tensor(tensor)
                described[name] = listing.TensorStorageMetadata(properties, whole, [])
            described[name].chunks.append(chunk)
            put(listing.MetadataIndex(name, chunk.offsets), tensor)
            del piece, tensor  # else they would be there beside the next
        # Megatron-core asks every linear layer for a state besides its weight, which only Transformer Engine has.
        for name, saved in list(described.items()):
            if ".linear_" in name and name.endswith(".weight"):
                layers = saved.size[0]
                for layer in range(layers):
                    state = f"{name.removesuffix('weight')}_extra_state/shard_{layer}_{layers}"
                    described[state] = listing.BytesStorageMetadata()
                    put(listing.MetadataIndex(state), [None])
    _add(tar, METADATA, pickle.dumps(listing.Metadata(described, storage_data=stored)))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    tar.addfile(entry(name, len(content)), io.BytesIO(content))
