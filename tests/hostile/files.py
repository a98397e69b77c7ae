"""Files that no user should have to fear: sound ones, and what a stranger or a bad disk makes of them."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from omegaconf import OmegaConf

LAYERS, HIDDEN, FFN = 2, 16, 32
CONFIG = {
    "mcore_gpt": True,
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "kv_channels": None,
    "activation": "gelu",
    "encoder_seq_length": 32,
    "tokenizer": {"library": "sentencepiece", "model": "nemo:tokenizer.model"},
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
}
#: What an adapter of ours says of that base.
SHAPE = {
    name: CONFIG[name]
    for name in (
        "num_layers", "hidden_size", "ffn_hidden_size", "activation", "num_attention_heads", "num_query_groups",
    )
}  # fmt: skip
SHAPES = {
    "self_attention.linear_qkv": (3 * HIDDEN, HIDDEN),
    "self_attention.linear_proj": (HIDDEN, HIDDEN),
    "mlp.linear_fc1": (FFN, HIDDEN),
    "mlp.linear_fc2": (HIDDEN, FFN),
}
LORA = {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": 2, "target_modules": ["attention_qkv"]}}
Files = dict[str, bytes]
TERABYTE = 2**40
#: Written by no file, if all goes well.
CANARY = Path("/tmp") / f"canary-{os.getpid()}"


class Call:
    """Unpickled, calls a function."""

    def __init__(self, function: Callable, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def calls(canary: Path) -> dict[str, Call]:
    """Pickles that would write ``canary``, by what they ask for."""
    write = f"open({str(canary)!r}, 'w')"
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "builtins.eval": Call(eval, write),
        "builtins.exec": Call(builtins.exec, write),
        "subprocess.check_call": Call(subprocess.check_call, ["touch", str(canary)]),
        "builtins.open": Call(open, str(canary), "w"),
        "pathlib.Path.touch": Call(Path.touch, canary),
        "torch.PyTorchFileWriter": Call(torch._C.PyTorchFileWriter, str(canary)),
        "torch.storage._load_from_bytes": Call(
            torch.storage._load_from_bytes, saved(Call(os.system, f"touch {canary}"))
        ),
    }


def saved(value, **options) -> bytes:
    """As torch saves it."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def yaml(config: dict) -> bytes:
    return OmegaConf.to_yaml(OmegaConf.create(config)).encode()


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        f"model.decoder.layers.{layer}.{path}.weight": torch.randn(shape, generator=draw)
        for path, shape in SHAPES.items()
        for layer in range(LAYERS)
    }


def lora() -> dict[str, torch.Tensor]:
    name = "model.decoder.layers.{}.self_attention.adapter_layer.lora_kqv_adapter.linear_{}.weight"
    shapes = {"in": (2, HIDDEN), "out": (3 * HIDDEN, 2)}
    return {name.format(layer, part): torch.ones(shape) for layer in range(LAYERS) for part, shape in shapes.items()}


def single() -> Files:
    """A base in one torch file."""
    return {"model_config.yaml": yaml(CONFIG), "tokenizer.model": b"x", "model_weights.ckpt": saved(weights())}


def nemos_own(peft: dict = LORA) -> Files:
    """An adapter in NeMo's form."""
    return {"model_config.yaml": yaml(CONFIG | {"peft": peft}), "model_weights.ckpt": saved(lora())}


def distributed(folder: Path, extra=None) -> Files:
    """A base in pieces, with something that a layer keeps beside its weights."""
    import torch.distributed.checkpoint as dcp

    state = weights() | {"model.decoder._extra_state": extra}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    files = {f"model_weights/{path.name}": path.read_bytes() for path in folder.iterdir()}
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    files["model_weights/metadata.json"] = json.dumps(backends).encode()
    files["model_weights/common.pt"] = saved({"epoch": 0})
    return {"model_config.yaml": yaml(CONFIG)} | files


def pack(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            add(tar, name, content)
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def header(name: str, kind: bytes, size: int) -> bytes:
    """A tar header that declares what it likes, with a right checksum."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 0 else b"\xff" * 4 + struct.pack(">q", size)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: dict[str, str]) -> bytes:
    """An extended header for the next member."""
    body = b""
    for key, value in records.items():
        text = f" {key}={value}\n".encode()
        length = len(text) + len(str(len(text) + 2))
        body += f"{length}".encode() + text
    return header("pax", tarfile.XHDTYPE, len(body)) + body + bytes(-len(body) % 512)


def tar_tricks(files: Files) -> Iterator[tuple[str, bytes]]:
    """What can be done to a tar that holds ``files``."""

    def packed(change: Callable[[tarfile.TarFile], None] | None = None, skip: str = "", mode: str = "w") -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as tar:
            for name, content in files.items():
                if name != skip:
                    add(tar, name, content)
            if change:
                change(tar)
        return buffer.getvalue()

    first, last = next(iter(files)), list(files)[-1]
    sound = packed()
    end = bytes(1024)
    body = sound.rstrip(b"\0")
    body += bytes(-len(body) % 512)
    members = {
        "link": dict(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "hard link": dict(type=tarfile.LNKTYPE, linkname=first),
        "device": dict(type=tarfile.CHRTYPE),
        "pipe": dict(type=tarfile.FIFOTYPE),
    }
    for name, fields in members.items():
        yield name, packed(lambda tar, fields=fields: add(tar, "x", **fields))
        yield f"{name} instead", packed(lambda tar, fields=fields: add(tar, last, **fields), skip=last)
    for name in ("/tmp/evil", "../evil", "a/../../evil", "a\\..\\evil", "a\nb", first, f"./{first}", f"{first}/x"):
        yield f"named {name!r}", packed(lambda tar, name=name: add(tar, name, b"x"))
    yield "compressed", packed(mode="w:gz")
    yield "compressed with xz", packed(mode="w:xz")
    yield "without its config", packed(skip="model_config.yaml")
    for kind, code in {
        "file": tarfile.REGTYPE, "long name": tarfile.GNUTYPE_LONGNAME, "extended header": tarfile.XHDTYPE,
        "global header": tarfile.XGLTYPE, "sparse file": tarfile.GNUTYPE_SPARSE, "unknown": b"Q",
    }.items():  # fmt: skip
        yield f"{kind} of a terabyte", header("x", code, TERABYTE) + sound
        yield f"{kind} of a terabyte at the end", body + header("x", code, TERABYTE) + end
    yield "file of a negative size", header("x", tarfile.REGTYPE, -1024) + sound
    yield "member of a negative size", body + header("x", tarfile.REGTYPE, -1024) + end
    for name, records in {
        "a terabyte": {"size": str(TERABYTE)}, "a negative size": {"size": "-1024"}, "holes": {"GNU.sparse.major": "1"},
        "a link": {"linkpath": "/etc/passwd"}, "a way out": {"path": "../evil"}, "no number": {"size": "x"},
    }.items():  # fmt: skip
        kind = tarfile.SYMTYPE if name == "a link" else tarfile.REGTYPE
        yield f"extended header with {name}", body + pax(records) + header("x", kind, 0) + end
    for part in (0, 100, 512, 513, len(body) // 2, len(body) - 1, len(body)):
        yield f"cut off after {part} bytes", sound[:part]
    with tarfile.open(fileobj=io.BytesIO(sound)) as tar:
        for member in tar:
            for place in (0, 124, 148):
                flipped = bytearray(sound)
                flipped[member.offset + place] ^= 1
                yield f"bit flipped at {place} of the header of {member.name}", bytes(flipped)
    yield "no tar", b"hello"
    yield "zeros", bytes(10240)


def bad_configs(canary: Path) -> Iterator[tuple[str, bytes]]:
    """``model_config.yaml`` that bombs, lies, or names what is to be called."""
    sound = yaml(CONFIG)
    bomb = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 40))
    yield "aliases that grow", bomb + sound
    yield "an alias to itself", b"a: &a [*a]\n" + sound
    call = f'!!python/object/apply:os.system ["touch {canary}"]'.encode()
    yield "a tag that calls", b"a: " + call + b"\n" + sound
    yield "a tag that names", b"a: !!python/name:os.system\n" + sound
    yield "a tag of bytes", b"a: !!binary aGVsbG8=\n" + sound
    yield "an unknown tag", b"a: !x 1\n" + sound
    yield "nested lists", b"a: " + b"[" * 100_000 + b"]" * 100_000 + b"\n" + sound
    yield "nested sections", b"".join(b" " * i + b"a:\n" for i in range(200)) + b" " * 200 + b"a: 1\n" + sound
    yield "too many entries", b"a: [" + b"1, " * 200_000 + b"1]\n" + sound
    yield "too large", b"a: " + b"x" * 5 * 2**20 + b"\n" + sound
    yield "not UTF-8", b"a: \xff\xfe\n" + sound
    yield "not YAML", b"{" + sound
    yield "a list", b"- 1\n- 2\n"
    yield "two documents", sound + b"---\na: 1\n"
    yield "a name twice", sound + b"hidden_size: 8\n"
    yield "a number of 5,000 digits", b"a: " + b"9" * 5000 + b"\n" + sound
    yield "an environment variable", b"a: ${oc.env:HOME}\n" + sound
    yield "references that grow", b'a: "xx"\nb: "${a}${a}"\n' + sound
    yield "empty", b""
    for name, change in {
        "a billion layers": {"num_layers": 10**9},
        "a trillion wide": {"hidden_size": 10**12},
        "a negative size": {"hidden_size": -16},
        "no size": {"hidden_size": None},
        "words for a size": {"ffn_hidden_size": "wide"},
        "a size that is no number": {"hidden_size": float("nan")},
        "a yes for a size": {"num_layers": True},
        "a long context": {"encoder_seq_length": 10**10},
        "a function as target": {"target": "os.system"},
        "a module as target": {"target": "antigravity"},
        "a module's class as target": {"target": "canary.Canary"},
        "another class of NeMo as target": {"target": "nemo.collections.asr.models.EncDecCTCModel"},
        "a list as target": {"target": ["os.system"]},
        "something to call": {"optim": {"_target_": "os.system", "command": f"touch {canary}"}},
        "something to call, deep": {"a": [{"b": {"_target_": "os.system"}}]},
        "something to call, of old": {"cls": "os.system", "params": {}},
        "arguments": {"params": {"command": f"touch {canary}"}},
        "a tokenizer that is unpickled": {"tokenizer": {"library": "tabular"}},
        "a tokenizer with code": {"tokenizer": {"library": "huggingface", "type": "x", "trust_remote_code": True}},
        "a tokenizer that is a word": {"tokenizer": "gpt2"},
        "a method that is a list": {"peft": ["lora"]},
        "files to write": {"memory_profile": {"enabled": True, "output_path": str(canary.parent)}},
    }.items():
        yield name, yaml(CONFIG | LORA_OR_NOTHING | change)


#: ``bad_configs`` are tried on bases and, with this, on adapters.
LORA_OR_NOTHING = {"peft": LORA}


def bad_weights(canary: Path, sound: dict[str, torch.Tensor]) -> Iterator[tuple[str, bytes]]:
    """``model_weights.ckpt`` that calls, lies or is damaged."""
    for name, call in calls(canary).items():
        yield f"calls {name}", saved({**sound, "x": call})
    call = Call(os.system, f"touch {canary}")
    yield "calls deep inside", saved({**sound, "x": [{"y": (1, call)}]})
    yield "calls in a list", saved([call])
    yield "a bare pickle", pickle.dumps({**dict.fromkeys(sound, 1), "x": call})
    yield "an old torch file", saved({**sound, "x": call}, _use_new_zipfile_serialization=False)
    content = saved(sound)
    grown = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(grown, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    yield "compressed", grown.getvalue()
    yield "empty", b""
    yield "cut off", content[: len(content) // 2]
    yield "cut off at the end", content[:-30]
    yield "a list", saved(list(sound.values()))
    yield "one tensor", saved(torch.ones(2))
    yield "nothing in it", saved({})
    some = next(iter(sound))
    yield "a tensor missing", saved({key: value for key, value in sound.items() if key != some})
    yield "another shape", saved({**sound, some: sound[some][:, :1]})
    yield "words", saved({**sound, some: "x"})
