"""What stands in where NeMo, megatron-core and Lightning unpickle files: reading that runs nothing."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

from nemo_tiedlora.platform.patch import Restore, patch


@patch(needed=lambda: True)
def torch_load_without_code(restore: Restore) -> None:
    """NeMo, megatron-core and Lightning load every torch file with `weights_only=False`, which runs what is in it.

    Weights, optimizer states, `common.pt` and what layers keep beside their weights are data; they are read as data.
    A file that the user names by its SHA-256 is read as before.
    """
    import torch

    from nemo_tiedlora.checkpoint import pickles

    stock = torch.load
    signature = inspect.signature(stock)

    def load(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        if given.get("weights_only") is True or not pickles.guarded():
            return stock(*args, **kwargs)
        try:
            return pickles.load(given["f"], given.get("map_location"), bool(given.get("mmap")), old=True)
        except pickles.Refused as error:
            raise pickles.refusal(given["f"], error) from None

    restore.set(torch, "load", load)


@patch(needed=lambda: True)
def piece_lists_without_code(restore: Restore) -> None:
    """The list of a distributed checkpoint's pieces (`.metadata`) is a pickle, which runs what is in it."""
    from torch.distributed.checkpoint import filesystem

    from nemo_tiedlora.checkpoint import pickles

    stock = filesystem.pickle

    def load(file):
        if not pickles.guarded():
            return stock.load(file)
        try:
            return pickles.PieceList.read(file)
        except pickles.Refused as error:
            raise pickles.refusal(file, error) from None

    restore.set(filesystem, "pickle", SimpleNamespace(**vars(stock) | {"load": load}))


@patch(needed=lambda: True)
def row_indices_without_code(restore: Restore) -> None:
    """NeMo's index of a text file's rows lies beside it, as numpy arrays and a pickle that it lets run anything."""
    import numpy
    from nemo.collections.nlp.data.language_modeling import text_memmap_dataset
    from nemo.collections.nlp.data.language_modeling.megatron import dataset_utils

    from nemo_tiedlora.checkpoint import pickles

    def load_array(file, *args, **kwargs):
        try:
            return numpy.load(file, *args, **kwargs | {"allow_pickle": False})
        except ValueError:
            raise pickles.refusal(file, "not an index of rows; remove it, and it is made again") from None

    def load_info(file):
        try:
            info = pickles.Plain.read(file)
            if not isinstance(info, dict):
                raise pickles.Refused("not an index of rows")
            return info
        except pickles.Refused as error:
            raise pickles.refusal(file, f"{error}; remove it, and it is made again") from None

    stock = text_memmap_dataset.pickle
    restore.set(text_memmap_dataset, "pickle", SimpleNamespace(**vars(stock) | {"load": load_info}))
    for module in (text_memmap_dataset, dataset_utils):
        restore.set(module, "np", SimpleNamespace(**vars(numpy) | {"load": load_array}))
