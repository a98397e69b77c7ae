"""Hostile files through every door that takes them: one line, exit code 2, nothing run, nothing written.

Every door is the function behind a command or a script. None of these files gets so far that NeMo is imported.
"""

import io
import json
import pickle
import struct
import sys
from dataclasses import replace
from pathlib import Path

import files
import pytest
import torch
from files import CANARY
from omegaconf import OmegaConf
from typer.testing import CliRunner

from nemo_tiedlora import cli
from nemo_tiedlora.checkpoint import store, write
from nemo_tiedlora.errors import UsageError

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A sound adapter."""
    from checkpoint.conftest import _make

    path = tmp_path_factory.mktemp("adapter") / "adapter.nemo"
    write(replace(_make(shape=files.SHAPE), model_config=None), path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return files.pack(tmp_path_factory.mktemp("base") / "base.nemo", files.single())


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return files.distributed(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The main job's config."""
    from hydra import compose, initialize_config_dir

    from nemo_tiedlora.job.script import prepare_hydra

    prepare_hydra()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("megatron_gpt_finetuning_config")


def command(*arguments):
    """``tiedlora``: its exit code and the line that it ends in."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    if isinstance(result.exception, UsageError):
        return 2, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def generate(*arguments):
    import megatron_gpt_generate

    result = CliRunner().invoke(megatron_gpt_generate.app, ["x", *map(str, arguments)])
    assert isinstance(result.exception, UsageError), result.exception
    return 2, str(result.exception)


def finetune(job, folder, **settings):
    from nemo_tiedlora.job.finetune import finetune as run

    cfg = job.copy()
    cfg.exp_manager.explicit_log_dir = str(folder)
    for name, value in settings.items():
        OmegaConf.update(cfg, f"model.{name.replace('__', '.')}", str(value))
    try:
        run(cfg)
    except UsageError as error:
        return 2, str(error)
    return 0, ""


def assert_refused(door, path, canary, out=None):
    code, line = door
    assert code == 2, line
    assert "\n" not in line and len(line) < 1500 and str(path) in line and "Traceback" not in line, line
    assert not canary.exists()
    assert out is None or not out.exists()


def check_base(path, adapter, job, canary, tmp_path):
    out = tmp_path / "out.nemo"
    assert_refused(command("merge", "--force", "--base", path, "--adapter", adapter, "--out", out), path, canary, out)
    assert_refused(generate("--base", path), path, canary)
    assert_refused(finetune(job, tmp_path / "run", restore_from_path=path), path, canary, tmp_path / "run")


def check_adapter(path, base, job, canary, tmp_path, scheme="tied_lora"):
    out = tmp_path / "out.nemo"
    assert_refused(command("inspect", path), path, canary)
    assert_refused(command("merge", "--force", "--base", base, "--adapter", path, "--out", out), path, canary, out)
    assert_refused(command("analyze", "conversion", "--base", base, "--adapter", path, "--out", tmp_path / "o.png"),
                   path, canary, tmp_path / "o.png")  # fmt: skip
    assert_refused(generate("--base", base, "--adapter", path), path, canary)
    settings = {"restore_from_path": base, "peft__restore_from_path": path, "peft__peft_scheme": scheme}
    assert_refused(finetune(job, tmp_path / "run", **settings), path, canary, tmp_path / "run")


def named(cases):
    return [pytest.param(content, id=name) for name, content in cases]


@pytest.mark.parametrize("content", named(files.tar_tricks(files.single())))
def test_a_base_in_a_bad_tar(content, adapter, job, canary, tmp_path):
    (tmp_path / "bad.nemo").write_bytes(content)
    check_base(tmp_path / "bad.nemo", adapter, job, canary, tmp_path)


@pytest.mark.parametrize("content", named(files.tar_tricks(files.nemos_own())))
def test_an_adapter_of_nemos_in_a_bad_tar(content, base, job, canary, tmp_path):
    (tmp_path / "bad.nemo").write_bytes(content)
    check_adapter(tmp_path / "bad.nemo", base, job, canary, tmp_path, "lora")
    assert_refused(command("convert", tmp_path / "bad.nemo", "--out", tmp_path / "new"), tmp_path / "bad.nemo", canary)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", named(files.bad_configs(CANARY)))
def test_a_bad_config_of_a_base(text, adapter, job, canary, tmp_path):
    path = files.pack(tmp_path / "bad.nemo", files.single() | {"model_config.yaml": text})
    check_base(path, adapter, job, canary, tmp_path)
    assert_refused(command("params", "--base", path), path, canary) if b"hidden_size" in text else None


@pytest.mark.parametrize("text", named(files.bad_configs(CANARY)))
def test_a_bad_config_of_an_adapter_of_nemos(text, base, job, canary, tmp_path):
    path = files.pack(tmp_path / "bad.nemo", files.nemos_own() | {"model_config.yaml": text})
    check_adapter(path, base, job, canary, tmp_path, "lora")


@pytest.mark.parametrize("content", named(files.bad_weights(CANARY, files.weights())))
def test_bad_weights_of_a_base(content, adapter, job, canary, tmp_path):
    path = files.pack(tmp_path / "bad.nemo", files.single() | {"model_weights.ckpt": content})
    check_base(path, adapter, job, canary, tmp_path)


@pytest.mark.parametrize("where", ["model_weights.ckpt", "mp_rank_00/model_weights.ckpt"])
@pytest.mark.parametrize("call", files.calls(CANARY))
def test_an_adapter_of_nemos_that_calls(call, where, base, job, canary, tmp_path):
    sound = files.nemos_own()
    del sound["model_weights.ckpt"]
    content = files.saved({**files.lora(), "x": files.calls(CANARY)[call]})
    path = files.pack(tmp_path / "bad.nemo", sound | {where: content})
    check_adapter(path, base, job, canary, tmp_path, "lora")
    assert "trust_sha256=" in command("inspect", path)[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_of_nemos_that_is_not_finite(value, base, job, canary, tmp_path):
    tensors = files.lora()
    next(iter(tensors.values()))[0, 0] = value
    path = files.pack(tmp_path / "bad.nemo", files.nemos_own() | {"model_weights.ckpt": files.saved(tensors)})
    check_adapter(path, base, job, canary, tmp_path, "lora")


@pytest.mark.parametrize("scheme", ["tied_lora", "vera", "share_lora", "cond_lora", "dyna_lora"])
@pytest.mark.parametrize("harmless", [True, False])
def test_our_methods_in_nemos_form(scheme, harmless, base, job, canary, tmp_path):
    tensors = files.lora() | ({} if harmless else {"x": files.calls(CANARY)["os.system"]})
    sound = files.nemos_own({"peft_scheme": scheme})
    path = files.pack(tmp_path / "bad.nemo", sound | {"model_weights.ckpt": files.saved(tensors)})
    check_adapter(path, base, job, canary, tmp_path, scheme)
    assert "take the file as it was saved" in command("inspect", path)[1]


def test_several_methods_in_one_file_run_nothing(base, job, canary, tmp_path):
    tensors = files.lora() | {"x": files.calls(CANARY)["os.system"]}
    sound = files.nemos_own({"peft_scheme": "lora,tied_lora"})
    path = files.pack(tmp_path / "bad.nemo", sound | {"model_weights.ckpt": files.saved(tensors)})
    check_adapter(path, base, job, canary, tmp_path, "lora,tied_lora")


def canonical_cases():
    """What can be done to a canonical adapter's files, by their content."""

    def forge(**changes):
        def change(content):
            config = json.loads(content[store.CONFIG]) | changes
            config["sha256"] = store._sha256(config)
            return content | {store.CONFIG: store._dump(config)}

        return change

    def tensors(change):
        def changed(content):
            from safetensors.torch import load, save

            loaded = load(content[store.TENSORS])
            change(loaded)
            return signed(content | {store.TENSORS: save(loaded)})

        return changed

    def raw(lie):
        return lambda content: signed(content | {store.TENSORS: lie(content[store.TENSORS])})

    def named(**changes):
        def lie(payload):
            size = struct.unpack("<Q", payload[:8])[0]
            entries = json.loads(payload[8 : 8 + size])
            entries[next(name for name in entries if name != "__metadata__")] |= changes
            text = json.dumps(entries).encode()
            return struct.pack("<Q", len(text)) + text + payload[8 + size :]

        return raw(lie)

    def model_config(text):
        import hashlib

        return lambda content: (
            forge(model_config_sha256=hashlib.sha256(text).hexdigest())(content) | {store.MODEL_CONFIG: text}
        )

    def fill(value):
        return lambda loaded: next(iter(loaded.values())).view(-1)[:1].fill_(value)

    yield "NaN", tensors(fill(float("nan")))
    yield "infinity", tensors(fill(float("inf")))
    yield (
        "another shape",
        tensors(lambda loaded: loaded.update({key: loaded[key][..., :1].contiguous() for key in loaded})),
    )
    yield "whole numbers", tensors(lambda loaded: loaded.update({key: loaded[key].int() for key in loaded}))
    yield "a tensor too many", tensors(lambda loaded: loaded.update(x=torch.ones(1)))
    yield "no tensors", tensors(lambda loaded: loaded.clear())
    yield "a pickle for tensors", raw(lambda payload: pickle.dumps(files.calls(CANARY)["os.system"]))
    yield "a torch file for tensors", raw(lambda payload: files.saved(files.calls(CANARY)["os.system"]))
    yield "names of a terabyte", raw(lambda payload: struct.pack("<Q", files.TERABYTE) + payload[8:])
    yield "names of 2^64 bytes", raw(lambda payload: b"\xff" * 8 + payload[8:])
    yield "nested names", raw(lambda payload: struct.pack("<Q", 200_000) + b"[" * 200_000)
    yield "names that are no JSON", raw(lambda payload: struct.pack("<Q", 4) + b"{]} ")
    yield "tensors cut off", raw(lambda payload: payload[:-1])
    yield "tensors too long", raw(lambda payload: payload + b"x")
    yield "places outside", named(data_offsets=[0, 2**40])
    yield "places backwards", named(data_offsets=[64, 0])
    yield "negative places", named(data_offsets=[-64, 0])
    yield "a trillion numbers", named(shape=[2**40])
    yield "shapes that overflow", named(shape=[2**33, 2**33])
    yield "an unknown type", named(dtype="OBJECT")
    yield "another format", forge(format=2)
    yield "an unknown method", forge(method="os.system")
    yield "settings in a list", forge(settings=[])
    yield "a rank of a trillion", forge(settings={"rank": 10**12})
    yield "groups in a file", forge(method="share_lora", settings={"groups": "/etc/passwd"})
    yield "a base of a billion layers", forge(base={"shape": files.SHAPE | {"num_layers": 10**9}, "checksums": {}})
    yield "a base a trillion wide", forge(base={"shape": files.SHAPE | {"hidden_size": 10**12}, "checksums": {}})
    yield "checksums of nothing", forge(payload_sha256=0)
    yield "a config that was changed", lambda content: content | {store.CONFIG: content[store.CONFIG][:-2] + b" \n"}
    yield "a nested config", lambda content: content | {store.CONFIG: b"[" * 100_000}
    yield "a config of numbers", lambda content: content | {store.CONFIG: b"9" * 6000}
    yield "a pickle for a config", lambda content: content | {store.CONFIG: pickle.dumps(1)}
    yield "no config", lambda content: {name: text for name, text in content.items() if name != store.CONFIG}
    for name, text in (
        ("aliases that grow", b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1)
                                                             for i in range(1, 40))),
        ("a tag that calls", f'a: !!python/object/apply:os.system ["touch {CANARY}"]\n'.encode()),
        ("a module as target", b"target: antigravity\n"),
    ):  # fmt: skip
        yield name, model_config(text)


def signed(content):
    """With right checksums, as a stranger can write them."""
    import hashlib

    config = json.loads(content[store.CONFIG]) | {
        "payload_sha256": hashlib.sha256(content[store.TENSORS]).hexdigest(),
    }
    config["sha256"] = store._sha256(config)
    return content | {store.CONFIG: store._dump(config)}


def unpacked(path):
    import tarfile

    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.mark.parametrize("change", named(canonical_cases()))
def test_a_canonical_adapter(change, adapter, base, job, canary, tmp_path):
    path = files.pack(tmp_path / "bad.nemo", change(unpacked(adapter)))
    check_adapter(path, base, job, canary, tmp_path)


@pytest.mark.parametrize("content", [*range(40)], ids=str)
def test_a_canonical_adapter_in_a_bad_tar(content, adapter, base, job, canary, tmp_path):
    tricks = list(files.tar_tricks(unpacked(adapter)))
    for name, trick in tricks[content::40]:
        (tmp_path / "bad.nemo").write_bytes(trick)
        try:
            check_adapter(tmp_path / "bad.nemo", base, job, canary, tmp_path)
        except AssertionError as error:
            raise AssertionError(name) from error


def pieces_cases():
    """What can be done to a base in pieces: each takes its files and the list of its pieces, and changes them."""
    call = files.calls(CANARY)

    def replaced(name, content):
        return lambda found, metadata: found.update({f"model_weights/{name}": content})

    for name, one in call.items():
        yield f".metadata calls {name}", replaced(".metadata", pickle.dumps(one))
        yield f"common.pt calls {name}", replaced("common.pt", files.saved({"x": one}))
    yield "a list of pieces and a call", replaced(".metadata", pickle.dumps([1, call["os.system"]]))
    yield "a list that claims all memory", replaced(".metadata", b"\x80\x04Nr\xff\xff\xff\xff.")
    yield "a list that claims a terabyte", replaced(".metadata", b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.")
    yield "an empty list", replaced(".metadata", b"")
    yield "a list of something else", replaced(".metadata", pickle.dumps({"a": 1}))
    yield (
        "a format that unpickles",
        replaced("metadata.json", b'{"sharded_backend": "zarr"}'),
    )
    yield "no format", lambda found, metadata: found.pop("model_weights/metadata.json")
    yield "a nested format", replaced("metadata.json", b"[" * 100_000)
    yield "an object beside it", replaced("x.pt", files.saved(call["os.system"]))
    yield (
        "common.pt cut off",
        lambda found, metadata: found.update({"model_weights/common.pt": found["model_weights/common.pt"][:200]}),
    )
    yield (
        "pieces cut off",
        lambda found, metadata: found.update(
            {name: content[:-600] for name, content in found.items() if name.endswith(".distcp")}
        ),
    )
    yield "no pieces", lambda found, metadata: [found.pop(name) for name in list(found) if name.endswith(".distcp")]

    def info(**changes):
        def change(found, metadata):
            index = next(index for index in metadata.storage_data if "linear_qkv" in index.fqn)
            metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)

        return change

    yield "pieces elsewhere", info(relative_path="../../../etc/passwd")
    yield "pieces anywhere", info(relative_path="/etc/passwd")
    yield "pieces behind the end", info(offset=2**40)
    yield "pieces before the start", info(offset=-100)
    yield "pieces of a terabyte", info(length=2**40)
    yield "pieces of a negative size", info(length=-1)
    yield "pieces of no size", info(length=None)
    yield "pieces too small", info(length=10)

    def sizes(size):
        def change(found, metadata):
            name = next(name for name in metadata.state_dict_metadata if "linear_qkv" in name)
            saved = metadata.state_dict_metadata[name]
            saved.size = torch.Size(size)
            for chunk in saved.chunks:
                chunk.sizes = torch.Size(size)

        return change

    yield "a weight of a trillion numbers", sizes((2**20, 2**20))
    yield "a weight of another shape", sizes((1, 1))
    yield (
        "a layer missing",
        lambda found, metadata: [
            metadata.storage_data.pop(index) for index in list(metadata.storage_data) if "layers.1.mlp" in index.fqn
        ],
    )
    yield "a weight that is none", lambda found, metadata: metadata.state_dict_metadata.clear()


@pytest.mark.parametrize("change", named(pieces_cases()))
def test_a_base_in_pieces(change, pieces, adapter, job, canary, tmp_path):
    found = dict(pieces)
    metadata = pickle.loads(found["model_weights/.metadata"])
    before = found["model_weights/.metadata"]
    change(found, metadata)
    if found["model_weights/.metadata"] == before:
        found["model_weights/.metadata"] = pickle.dumps(metadata)
    check_base(files.pack(tmp_path / "bad.nemo", found), adapter, job, canary, tmp_path)


@pytest.mark.parametrize("call", files.calls(CANARY))
@pytest.mark.parametrize("hidden", ["object", "bytes", "numbers"])
def test_what_a_layer_keeps_beside_its_weights(call, hidden, adapter, job, canary, tmp_path):
    """Transformer Engine unpickles it, whether it is an object, bytes of torch's or a tensor of bytes."""
    extra = files.calls(CANARY)[call]
    if hidden == "bytes":
        extra = io.BytesIO(files.saved(extra))
    if hidden == "numbers":
        extra = [torch.frombuffer(bytearray(pickle.dumps(extra)), dtype=torch.uint8)]
    path = files.pack(tmp_path / "bad.nemo", files.distributed(tmp_path / "pieces", extra))
    check_base(path, adapter, job, canary, tmp_path)
    state = files.weights() | {"model.decoder._extra_state": extra}
    files.pack(path, files.single() | {"model_weights.ckpt": files.saved(state)})
    check_base(path, adapter, job, canary, tmp_path)


GROUPS = [
    b"", b"[", b"[" * 100_000, b"9" * 6000, b"\xff\xfe", b"[]", b"{}", b"null", b'{"groups": null}',
    b'{"groups": "random_adjacent"}', b'{"groups": [[0, 1], [1, 0]]}', b'{"groups": [[0]]}', b'{"groups": [[0, 99]]}',
    b'{"groups": [[0, -1]]}', b'{"groups": [[0, 1.5]]}', b'{"groups": [[0, NaN]]}', b'{"groups": {"0": 1}}',
    b'{"groups": [[0, true]]}', b'{"groups": [[0, "1"]]}', pickle.dumps({"groups": [[0, 1]]}),
    b'{"groups": [[0, 1' + b"0" * 5000 + b"]]}",
]  # fmt: skip


@pytest.mark.parametrize("content", GROUPS, ids=lambda content: repr(content[:40]))
def test_groups(content, base, job, canary, tmp_path):
    path = tmp_path / "groups.json"
    path.write_bytes(content)
    code, line = command("params", "--scheme", "share_lora", "--groups", path, "--base", base)
    assert code == 2 and "\n" not in line and "groups" in line
    settings = {"peft__share_lora_tuning__groups": path, "peft__peft_scheme": "share_lora", "restore_from_path": base}
    code, line = finetune(job, tmp_path / "run", **settings)
    assert code == 2 and "\n" not in line and "groups" in line
    assert not (tmp_path / "run").exists()


LOG = b'{"modules": ["attention_qkv.0", "%s"], "active_steps": [1, %s]}'
ALLOCATIONS = [
    b"", b"[", b"[" * 100_000, b"9" * 6000, b"\xff\xfe", b"[]", b"null", LOG % (b"attention_qkv.0", b"2"),
    LOG % (b"mlp_fc1.1", b"NaN"), LOG % (b"mlp_fc1.1", b"-1"), LOG % (b"mlp_fc1.1", b"1" + b"0" * 400),
    LOG % (b"mlp_fc1.-1", b"1"), LOG % (b"mlp_fc1.1" + b"0" * 400, b"1"), LOG % (b"$\\\\frac$.1", b"1"),
    LOG % (b"mlp_fc1.\\u0662", b"1"), LOG % (b"mlp_fc1.1", b"true"), LOG % (b"mlp_fc1.1", b"[1]"),
    LOG % (b"mlp_fc1.1", b"1, 2"), pickle.dumps({"modules": []}),
]  # fmt: skip


@pytest.mark.parametrize("content", ALLOCATIONS, ids=lambda content: repr(content[-40:]))
def test_allocations(content, canary, tmp_path):
    path = tmp_path / "log.json"
    path.write_bytes(content)
    out = tmp_path / "out.png"
    assert_refused(command("analyze", "allocation", path, "--out", out), path, canary, out)
    assert not out.with_suffix(".json").exists()


def test_sound_files_pass(base, pieces, adapter, tmp_path):
    """What the hostile ones were made of."""
    from nemo_tiedlora.checkpoint.base import check_base as check
    from nemo_tiedlora.checkpoint.saved import saved_config

    check(base, "base")
    for extra in (None, io.BytesIO(files.saved(None)), torch.empty(0, dtype=torch.uint8)):
        found = files.distributed(tmp_path / f"{type(extra).__name__}", extra)
        check(files.pack(tmp_path / "pieces.nemo", found), "base")
    for path in (files.pack(tmp_path / "lora.nemo", files.nemos_own()), adapter):
        assert saved_config(path, "adapter")["peft"]["peft_scheme"] in ("lora", "tied_lora")
    assert command("convert", tmp_path / "lora.nemo", "--out", tmp_path / "new")[0] == 0
    assert command("merge", "--force", "--base", base, "--adapter", adapter, "--out", tmp_path / "merged.nemo")[0] == 0


def test_calls_do_call_where_nothing_stops_them(canary):
    """The canary sings."""
    for name, call in files.calls(canary).items():
        pickle.loads(pickle.dumps(call))
        assert canary.exists(), name
        canary.unlink()


def test_only_a_file_that_is_trusted_by_its_sha256_is_read_as_it_is(base, canary, tmp_path):
    from nemo_tiedlora.checkpoint import pickles
    from nemo_tiedlora.checkpoint.base import check_base as check
    from nemo_tiedlora.files import sha256_of

    state = files.weights() | {"x": files.calls(CANARY)["os.system"]}
    path = files.pack(tmp_path / "bad.nemo", files.single() | {"model_weights.ckpt": files.saved(state)})
    with pickles.trusting([sha256_of(path)]):
        assert check(path, "base").num_layers == files.LAYERS
        with pickles.as_it_is(path):
            assert not pickles.guarded()
        with pickles.as_it_is(base):
            assert pickles.guarded()
    with pickles.trusting([sha256_of(base)]), pytest.raises(UsageError, match="trust_sha256="):
        check(path, "base")
    path = files.pack(tmp_path / "list.nemo", files.single() | {"model_config.yaml": b"- num_layers\n"})
    with pickles.trusting([sha256_of(path)]), pytest.raises(UsageError, match="not a list of settings with names"):
        check(path, "base")
