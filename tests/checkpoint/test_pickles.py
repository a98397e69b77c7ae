"""Pickles in torch files, cut off or changed at every place: refused in one way, or read."""

import io
import zipfile
from collections import OrderedDict

import pytest
import torch

from nemo_tiedlora.checkpoint import pickles

CONTENT = OrderedDict(step=300, tokens=70000, name="x", rate=0.5, tensors=[torch.ones(2)])


def with_pickle(change):
    """A torch file of ``CONTENT`` whose pickle is what ``change`` makes of it, with right checksums."""
    sound, out = io.BytesIO(), io.BytesIO()
    torch.save(CONTENT, sound)
    with zipfile.ZipFile(sound) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            target.writestr(info.filename, change(data) if info.filename.endswith("data.pkl") else data)
    return io.BytesIO(out.getvalue())


def size():
    sizes = []
    with_pickle(lambda data: sizes.append(len(data)) or data)
    return sizes[0]


def test_cut_off_anywhere_it_is_refused():
    assert pickles.load(with_pickle(lambda data: data))["step"] == 300
    for length in range(size()):
        with pytest.raises(pickles.Refused):
            pickles.load(with_pickle(lambda data, n=length: data[:n]))


@pytest.mark.parametrize("byte", [0x00, 0xFF, ord("r")])
def test_with_any_byte_changed_it_is_refused_or_read(byte):
    for place in range(size()):
        try:
            pickles.load(with_pickle(lambda data, n=place: data[:n] + bytes([byte]) + data[n + 1 :]))
        except pickles.Refused:
            continue
