"""The canonical adapter file: what goes in comes out, and whatever is wrong with a file is said of that file."""

import io
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import tarfile
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from nemo_tiedlora.checkpoint import read, write
from nemo_tiedlora.checkpoint.stack import stack, unstack
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.variants import METHODS, PRESETS, Method, Tied, TiedConfig

CASES = {
    **{preset: ("tied_lora", {"preset": preset}) for preset in PRESETS},
    "untied": ("tied_lora", {"train": ["A", "u"], "tie": []}),
    "layers": ("tied_lora", {"layer_selection": [1, 2, 4]}),
    "vera": ("vera", {}),
    "share": ("share_lora", {"groups": [[0, 1], [2, 3]], "rank_expansion": 6}),
    "cond": ("cond_lora", {"groups": [[0, 3]]}),
    "xs": ("lora_xs", {}),
    "uni": ("uni_lora", {"dimension": 100}),
    "dyna": ("dyna_lora", {"inner": "share_lora", "settings": {"groups": "odd_even"}, "active": 3}),
    "dora": ("tied_lora", {"dora": True, "target_modules": ["all"]}),
}
PLACES = ["folder", "file.nemo"]
LLAMA = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 11008,
    "num_attention_heads": 32,
    "num_query_groups": None,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_round_trip_is_exact(make, same, tmp_path, method, dtype, place):
    scheme, settings = CASES[method]
    adapter = make(scheme, dtype=dtype, **settings)
    write(adapter, tmp_path / place)
    assert same(read(tmp_path / place), adapter)


def test_the_tensor_file_stands_for_its_folder(make, same, tmp_path):
    adapter = make()
    write(adapter, tmp_path / "a")
    assert same(read(tmp_path / "a" / "adapter_model.safetensors"), adapter)


def test_the_tensor_file_is_one_that_others_read(make, tmp_path):
    adapter = make(preset="TL6")
    write(adapter, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "attention_qkv.A": (4, 32),
        "attention_qkv.B": (64, 4),
        "attention_qkv.0-3.u": (4, 4),
        "attention_qkv.0-3.v": (4, 64),
    }


def test_stored_frozen_tensors_come_back(make, same, tmp_path):
    adapter = make("vera")
    full = replace(adapter, tensors=adapter.tensors | adapter.drawn())
    write(full, tmp_path / "a")
    assert same(read(tmp_path / "a"), full)
    assert {"attention_qkv.A", "attention_qkv.B"} < set(read(tmp_path / "a").tensors)


def test_equal_adapters_give_equal_bytes(make, tmp_path):
    one, other = make(preset="TL6"), make(preset="TL6")
    other = replace(other, tensors=dict(reversed(other.tensors.items())))
    for place in PLACES:
        assert write(one, tmp_path / "one" / place) == write(other, tmp_path / "other" / place)
    one_files = [path for path in sorted((tmp_path / "one").rglob("*")) if path.is_file()]
    assert len(one_files) == 3
    for path in one_files:
        assert path.read_bytes() == (tmp_path / "other" / path.relative_to(tmp_path / "one")).read_bytes()


def test_folder_and_file_are_the_same_adapter(make, tmp_path):
    adapter = make()
    assert write(adapter, tmp_path / "a") == write(adapter, tmp_path / "a.nemo")
    changed = replace(adapter, tensors=adapter.tensors | {"attention_qkv.A": adapter.tensors["attention_qkv.A"] + 1})
    assert write(changed, tmp_path / "b") != write(adapter, tmp_path / "a")


@pytest.mark.parametrize("method", ["TL6", "vera", "LoRA", "dyna", "cond", "share", "dora"])
def test_a_folder_holds_the_trained_numbers_and_less_than_5_kb(make, tmp_path, method):
    scheme, settings = CASES[method]
    every = ["attention_q", "attention_k", "attention_v", "attention_dense", "mlp_gate", "mlp_up", "mlp_fc2"]
    for targets in (["attention_qkv"], ["all"], every):
        adapter = make(scheme, LLAMA, torch.bfloat16, **settings | {"target_modules": targets, "rank": 2})
        write(adapter, tmp_path / "a")
        size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
        trained = sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors.values())
        assert trained < size <= trained + 5000, (targets, size - trained)


def test_stacks_of_any_layers_come_apart_again():
    draw = random.Random(0)
    for _ in range(200):
        layers = draw.sample(range(40), draw.randint(1, 12))
        tensors = {f"t.{layer}.A": torch.full((2, draw.choice([3, 3, 4])), layer) for layer in layers}
        tensors |= {
            "t.A": torch.zeros(2),
            "t.group3.A": torch.ones(2),
            "qkv.7": torch.zeros(()),
            "a.1.b.2": torch.ones(3),
        }
        stacked = stack(tensors)
        back = unstack(stacked)
        assert set(back) == set(tensors) and all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", ["t.0-999999999.A", "t.3-1.A", "t.0,0.A", "t.0-2.A", "t.0-0.A", "t.0-1,5-6.A"])
def test_a_stack_that_lies_about_its_layers_is_refused(name):
    with pytest.raises(ValueError):
        unstack({name: torch.zeros(2, 2)})


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("attention_qkv.2.u"), "attention_qkv.2.u is missing"),
        (lambda t: t.update({"attention_qkv.9.u": torch.zeros(4)}), "attention_qkv.9.u is not one"),
        (lambda t: t.update({"attention_qkv.A": torch.zeros(4, 31)}), "attention_qkv.A has shape"),
        (lambda t: t.update({"attention_qkv.A": torch.zeros(4, 32).int()}), "attention_qkv.A is of type"),
    ],
)
def test_tensors_that_do_not_fit_are_named(make, change, said):
    adapter = make(preset="TL6")
    tensors = dict(adapter.tensors)
    change(tensors)
    with pytest.raises(UsageError, match=said):
        replace(adapter, tensors=tensors)


def forged(path, **changes):
    """A folder's config with other content and a correct checksum, as a stranger could write it."""
    from nemo_tiedlora.checkpoint import store

    config = json.loads((path / store.CONFIG).read_text())
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            config[section][field] = value
        else:
            config[section] = value
    config["sha256"] = store._sha256(config)
    (path / store.CONFIG).write_bytes(store._dump(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"method": "tied_lorra"},
        {"method": None},
        {"settings": []},
        {"settings": {"rank": 5}},
        {"settings__rank": 10**12},
        {"settings__rank": "4"},
        {"settings__target_modules": ["attention_dense"]},
        {"settings__layer_selection": [7]},
        {"settings__layer_selection": {"a": 1}},
        {"settings__nonsense": 1},
        {"method": "share_lora", "settings": {"groups": "/etc/passwd"}},
        {"method": "dyna_lora", "settings": {"inner": "share_lora", "settings": {"groups": "/dev/zero"}}},
        {"base": None},
        {"base": {"shape": {}}},
        {"base": {"shape": {}, "checksums": {}, "more": 1}},
        {"base": {"shape": {"num_layers": 10**9}, "checksums": {}}},
        {"versions": 3, "settings": {"preset": 7}},
        {"payload_sha256": 0},
    ],
    ids=str,
)
def test_a_forged_config_is_refused(make, tmp_path, changes):
    write(make(), tmp_path / "a")
    forged(tmp_path / "a", **changes)
    with pytest.raises(UsageError, match=str(tmp_path / "a")) as raised:
        read(tmp_path / "a")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("place", PLACES)
def test_cut_off_anywhere(make, tmp_path, place):
    adapter = make(preset="TL6")
    write(adapter, tmp_path / place)
    files = sorted((tmp_path / place).iterdir()) if place == "folder" else [tmp_path / place]
    draw = random.Random(0)
    for file in files:
        whole = file.read_bytes()
        used = len(whole.rstrip(b"\0"))  # a tar ends in blocks of zeros that nobody needs
        for length in {0, 1, used - 1, used // 2, *(draw.randrange(used) for _ in range(60))}:
            file.write_bytes(whole[:length])
            with pytest.raises(UsageError, match=str(tmp_path / place)):
                read(tmp_path / place)
        file.write_bytes(whole)
    read(tmp_path / place)


@pytest.mark.parametrize("place", PLACES)
def test_a_bit_flipped_anywhere(make, same, tmp_path, place):
    """Refused by name, or (in the padding of a tar) of no effect."""
    adapter = make(preset="TL6")
    write(adapter, tmp_path / place)
    files = sorted((tmp_path / place).iterdir()) if place == "folder" else [tmp_path / place]
    draw = random.Random(0)
    refused = 0
    for file in files:
        whole = file.read_bytes()
        for _ in range(250):
            flipped = bytearray(whole)
            flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            file.write_bytes(flipped)
            try:
                assert same(read(tmp_path / place), adapter)
            except UsageError as error:
                assert str(tmp_path / place) in str(error) and "\n" not in str(error)
                refused += 1
        file.write_bytes(whole)
    assert refused == 500 if place == "folder" else refused > 50


def test_foreign_files_are_refused_by_name(make, tmp_path):
    for name, content in {"text.nemo": b"hello", "empty.nemo": b"", "zeros.nemo": bytes(10240)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            read(tmp_path / name)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere", "nowhere.nemo"):
        with pytest.raises(UsageError, match=name):
            read(tmp_path / name)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UsageError, match="of another program"):
        read(tmp_path / "peft")


def member(name, kind=tarfile.REGTYPE, link="", content=b"x"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content) if kind == tarfile.REGTYPE else 0
    return info, io.BytesIO(content)


@pytest.mark.parametrize(
    "extra",
    [
        member("/etc/evil"),
        member("../evil"),
        member("a/../../evil"),
        member("a\\..\\evil"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("link", tarfile.LNKTYPE, "adapter_config.json"),
        member("device", tarfile.CHRTYPE),
        member("pipe", tarfile.FIFOTYPE),
        member("./adapter_config.json"),
        member("adapter_model.safetensors"),
    ],
    ids=lambda extra: f"{extra[0].name}-{extra[0].type.decode()}",
)
@pytest.mark.parametrize("first", [True, False])
def test_malicious_tars_are_refused(make, tmp_path, extra, first):
    write(make(), tmp_path / "good.nemo")
    with tarfile.open(tmp_path / "good.nemo") as good, tarfile.open(tmp_path / "bad.nemo", "w") as bad:
        members = [(info, good.extractfile(info)) for info in good]
        extra[1].seek(0)
        for info, content in [extra, *members] if first else [*members, extra]:
            bad.addfile(info, content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match="bad.nemo"):
        read(tmp_path / "bad.nemo")
    assert sorted(tmp_path.iterdir()) == before


def test_a_member_larger_than_its_tensors_is_not_read(make, tmp_path):
    write(make(), tmp_path / "good.nemo")
    with tarfile.open(tmp_path / "good.nemo") as good, tarfile.open(tmp_path / "bad.nemo", "w") as bad:
        for info in good:
            content = good.extractfile(info).read()
            if info.name.endswith(".safetensors"):
                content += bytes(64 * 2**20)
                info.size = len(content)
            bad.addfile(info, io.BytesIO(content))
    with pytest.raises(UsageError, match="larger than it can be"):
        read(tmp_path / "bad.nemo")


def write_in_turns(adapters, path, began):
    began.set()
    while True:
        for adapter in adapters:
            write(adapter, path)


@pytest.mark.parametrize("place", PLACES)
def test_killed_while_writing_leaves_a_whole_adapter(make, tmp_path, place):
    adapters = [make(preset="LoRA", seed=seed, shape={"hidden_size": 256}) for seed in range(2)]
    path = tmp_path / place
    write(adapters[0], path)
    draw = random.Random(0)
    # A fork of this process: one of its own would take many times as long to begin as all the rest takes.
    context = multiprocessing.get_context("fork")
    seen = set()

    def which():
        found = read(path).tensors
        return [all(torch.equal(found[k], one.tensors[k]) for k in found) for one in adapters].index(True)

    for _ in range(6):
        began = context.Event()
        process = context.Process(target=write_in_turns, args=(adapters, path, began), daemon=True)
        process.start()
        assert began.wait(60)
        for _ in range(10):  # stopped is as good as killed to a reader, and quicker
            time.sleep(draw.uniform(0, 0.03))
            os.kill(process.pid, signal.SIGSTOP)
            seen.add(which())
            os.kill(process.pid, signal.SIGCONT)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert which() in (0, 1)
        write(adapters[0], path)
        assert which() == 0
    assert seen == {0, 1}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_leaves_the_old_adapter(make, same, tmp_path, place):
    small, large = make(), make(shape={"hidden_size": 1024})
    write(small, tmp_path / place)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        with pytest.raises(UsageError, match="no disk space"):
            write(large, tmp_path / place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert same(read(tmp_path / place), small)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.fixture
def tiny_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("place", PLACES)
def test_a_full_file_system_leaves_the_old_adapter(make, same, tiny_disk, place):
    small = make(preset="TL5")
    write(small, tiny_disk / place)
    with pytest.raises(UsageError, match="no disk space"):
        write(make(shape={"hidden_size": 1024}), tiny_disk / place)
    assert same(read(tiny_disk / place), small)


def test_another_version_of_a_method_is_refused(make, tmp_path):
    METHODS.add(Method("grown", TiedConfig, Tied, "a method of one's own", version=2))
    try:
        write(make("grown"), tmp_path / "a")
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["method_version"] == 2
        assert read(tmp_path / "a").scheme == "grown"
        METHODS._known["grown"] = replace(METHODS["grown"], version=3)
        with pytest.raises(UsageError, match="it is of version 2 of grown; here it is 3"):
            read(tmp_path / "a")
    finally:
        METHODS._known.pop("grown")
    with pytest.raises(UsageError, match="method='grown'.*--methods FILE.py"):
        read(tmp_path / "a")
