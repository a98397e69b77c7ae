"""Hostile training checkpoints in a run's folder: one line, exit code 2, nothing run, nothing half taken.

One run of each kind is made; what its rerun does with a checkpoint, `Trainer.fit`, is tried on the same model in the
same process with every bad one.
"""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import zipfile
from pathlib import Path

import files
import forked
import pytest
import torch
import toy
from files import CANARY

from nemo_tiedlora import platform
from nemo_tiedlora.errors import UsageError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "megatron_gpt_finetuning.py"
KEY, STAGE = "attention_qkv.A", "attention_qkv.0.u"
#: The names of runs, and what is trained how; a scheme is the name of one with nothing else.
KINDS = {"lora in bfloat16": ("lora", "trainer.precision=bf16", "model.megatron_amp_O2=true")}
CALL = files.calls(CANARY)["os.system"]
NAN, INFINITE = float("nan"), float("inf")


def settings(folder: Path, kind: str) -> list[str]:
    """Of a small run of two steps."""
    scheme, *more = KINDS.get(kind, (kind,))
    return [
        *more,
        f"model.peft.peft_scheme={scheme}",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "trainer.limit_val_batches=1",
        f"exp_manager.exp_dir={folder / 'runs'}",
        "exp_manager.name=run",
        "exp_manager.create_tensorboard_logger=false",
        "model.data.validation_ds.metric.name=loss",
        "model.global_batch_size=4",
        "model.micro_batch_size=4",
        "model.optim.lr=1e-3",
    ]


class Run:
    """A run that has ended but for its summary: its model, its trainer and its last checkpoint."""

    def __init__(self, folder: Path, kind: str):
        from hydra import compose, initialize_config_dir

        from nemo_tiedlora.job.finetune import finetune
        from nemo_tiedlora.job.script import prepare_hydra
        from nemo_tiedlora.nemo import model

        def kept(build):
            def built(cfg, base, trainer, *more):
                self.trainer, self.model = trainer, build(cfg, base, trainer, *more)
                return self.model

            return built

        self.folder = folder
        prepare_hydra()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("megatron_gpt_finetuning_config", overrides=settings(folder, kind))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(model, "build_model", kept(model.build_model))
            finetune(cfg).unlink()
        (self.last,) = [*folder.rglob("*-last.ckpt"), *folder.rglob("*-last")]
        self.trainer.limit_val_batches = 0
        with torch.no_grad():  # as a new process has them: far from the checkpoint's
            for tensor in self.model.parameters():
                tensor.add_(0.5) if tensor.requires_grad else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Of the model."""
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}

    def continue_from(self, path: Path) -> str:
        """What is said of a checkpoint that is refused; the model is as it was."""
        before = self.tensors()
        with pytest.raises(UsageError) as refused:
            self.trainer.fit(self.model, ckpt_path=str(path))
        after = self.tensors()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        said = str(refused.value)
        assert "\n" not in said and len(said) < 1500 and str(path) in said, said
        return said

    def content(self) -> dict:
        return copy.deepcopy(torch.load(self.last, weights_only=False))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs by kind, made when asked for."""
    with platform.host(), toy.clean_megatron():
        made = {}

        def of(kind: str) -> Run:
            if kind not in made:
                made[kind] = Run(tmp_path_factory.mktemp(kind.replace(" ", "-")), kind)
            return made[kind]

        yield of


def changed(change):
    """A checkpoint with other content, as a stranger can save it."""

    def bad(run):
        content = run.content()
        new = change(content)
        return files.saved(content if new is None else new)

    return bad


def of_bytes(change):
    return lambda run: change(run.last.read_bytes())


def zipped(change) -> bytes:
    """The checkpoint as a zip archive with members changed by ``change(name, content)``, and right checksums."""

    def bad(content):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
            for info in source.infolist():
                target.writestr(info.filename, change(info.filename, source.read(info)))
        return out.getvalue()

    return of_bytes(bad)


def flipped(content: bytes) -> bytes:
    """With one bit of a tensor flipped: in the last member that has more than a few bytes."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        info = [one for one in archive.infolist() if "/data/" in one.filename and one.file_size >= 64][-1]
    place = info.header_offset + 30 + int.from_bytes(content[info.header_offset + 26 :][:2], "little")
    place += int.from_bytes(content[info.header_offset + 28 :][:2], "little")
    damaged = bytearray(content)
    damaged[place + 5] ^= 1
    return bytes(damaged)


def put(value, *path):
    """Sets something deep inside: a value, or what a function makes of the one that is there."""

    def change(content):
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value(content[path[-1]]) if callable(value) and not isinstance(value, type) else value

    return changed(change)


def drop(*path):
    def change(content):
        for name in path[:-1]:
            content = content[name]
        del content[path[-1]]

    return changed(change)


def filled(value):
    def change(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return change


def huge(*sizes):
    """A tensor that is a terabyte or more, though one number is stored."""
    return torch.ones(1).expand(sizes or (2**40,))


def any_file_cases():
    """Of a checkpoint in one file, whatever is trained: its bytes, and what Lightning and NeMo keep in it."""
    for name, call in files.calls(CANARY).items():
        yield f"calls {name}", put(call, "x"), "could run code"
    yield "calls deep inside", put([{"y": (1, CALL)}], "callbacks", "x"), "could run code"
    yield "calls in the record", put(CALL, "run", "settings", "model.seed"), "could run code"
    yield "calls in a random state", put(CALL, "random_states"), "could run code"
    yield "a bare pickle", of_bytes(lambda content: pickle.dumps({"adapters": CALL})), "damaged"
    yield "an old torch file", lambda run: files.saved({"x": CALL}, _use_new_zipfile_serialization=False), "damaged"
    yield "empty", of_bytes(lambda content: b""), "damaged"
    yield "cut off", of_bytes(lambda content: content[: len(content) // 2]), "cut off"
    yield "cut off at the end", of_bytes(lambda content: content[:-30]), "cut off"
    yield "one bit flipped", of_bytes(flipped), "damaged"
    yield (
        "tensors cut short",
        zipped(lambda name, data: data[: len(data) // 2] if "/data/" in name else data),
        "damaged",
    )
    yield "a pickle cut short", zipped(lambda name, data: data[:-20] if "data.pkl" in name else data), "damaged"
    text = b"\x80\x02\x8d" + (2**40).to_bytes(8, "little") + b"x."
    yield "a text of a terabyte", zipped(lambda name, data: text if "data.pkl" in name else data), "damaged"
    yield "a place of four billion", zipped(
        lambda name, data: b"\x80\x02Nr\xff\xff\xff\xff." if "data.pkl" in name else data
    ), "checkpoint="  # fmt: skip
    yield "a list", changed(lambda content: [content]), "no training state"
    yield "one tensor", changed(lambda content: torch.ones(2)), "no training state"
    yield "nothing in it", changed(lambda content: {}), "checkpoint="
    yield "a record that is a list", put([], "run"), "run is damaged"
    yield "a record with more", put(1, "run", "x"), "run is damaged"
    yield "a record with less", drop("run", "files"), "run is damaged"
    yield "a record of words", put("x", "run", "settings"), "run is damaged"
    yield "a record with a terabyte", put(huge(), "run", "settings", "model.seed"), "run is damaged"
    yield "no record", drop("run"), "does not say what it was trained with"
    yield "another base", put(["0" * 64], "run", "files", "model.data.train_ds.file_names"), "other content"
    yield "no step", drop("global_step"), "global_step is None"
    yield "a step of words", put("2", "global_step"), "global_step"
    yield "a step before the first", put(-1, "global_step"), "global_step is -1"
    yield "a step in a tensor", put(torch.ones(1000, 1000), "global_step"), "global_step"
    yield "a step after the last", put(3, "global_step"), "trainer.max_steps=2"
    yield "an epoch that is none", put(0.5, "epoch"), "epoch is 0.5"
    yield "no loops", drop("loops"), "loops is None"
    yield "loops of words", put("x" * 5000, "loops", "fit_loop"), "loops.fit_loop is"
    yield "loops without an end", put(INFINITE, "loops", "fit_loop", "epoch_progress", "total", "ready"), "is inf"
    yield "an end of a terabyte", put(huge(), "loops", "fit_loop", "epoch_progress", "total", "ready"), "loops.fit_loop"
    yield "no schedule", put([], "lr_schedulers"), "lr_schedulers must be a list of 1"
    yield "a schedule without a place", drop("lr_schedulers", 0, "last_epoch"), "last_epoch is missing"
    yield "a schedule of NaN", put([NAN], "lr_schedulers", 0, "base_lrs"), "base_lrs is [nan]"
    yield "an empty schedule", put([], "lr_schedulers", 0, "base_lrs"), "base_lrs is []"
    yield "no callbacks", put(None, "callbacks"), "callbacks must hold"
    yield "callbacks of words", put(lambda all: dict.fromkeys(all, "x"), "callbacks"), "callbacks must hold"
    yield "callbacks without state", put(lambda all: {name: {} for name in all}, "callbacks"), "is missing"
    yield "a file elsewhere", put(
        lambda all: {
            name: state | {"best_k_models": {"/etc/passwd": torch.ones(())}} if "best_k_models" in state else state
            for name, state in all.items()
        },
        "callbacks",
    ), "/etc/passwd"  # fmt: skip
    yield "a score that is none", put(
        lambda all: {
            name: state | {"best_k_models": dict.fromkeys(state["best_k_models"], "x")}
            if "best_k_models" in state
            else state
            for name, state in all.items()
        },
        "callbacks",
    ), "best_k_models"  # fmt: skip
    yield "random states that are none", put([{"python": 1}], "random_states"), "random_states is damaged"
    yield "a number for random states", put(5, "random_states"), "random_states is damaged"
    yield "random states cut off", put(lambda state: state[:-9], "random_states", 0, "torch"), "random_states"
    yield "random states of a terabyte", put(
        torch.ones(1, dtype=torch.uint8).expand(2**40), "random_states", 0, "torch"
    ), "random_states is damaged"  # fmt: skip
    yield "no version", drop("pytorch-lightning_version"), "pytorch-lightning_version"
    yield "a version that is none", put("x", "pytorch-lightning_version"), "pytorch-lightning_version"
    yield "a list for a version", put([1], "pytorch-lightning_version"), "pytorch-lightning_version"


def ours_cases():
    """Of a checkpoint of our methods: tensors and optimizer states by key."""
    here = ("adapters", "tied_lora")
    yield "NaN in a tensor", put(filled(NAN), *here, KEY, "tensor"), f"{KEY}.tensor has NaN"
    yield "infinity in a moment", put(filled(INFINITE), *here, STAGE, "exp_avg_sq"), f"{STAGE}.exp_avg_sq has NaN"
    yield "one column", put(lambda tensor: tensor[..., :1], *here, KEY, "tensor"), "has shape (8, 1) instead of"
    yield "a moment of one column", put(lambda tensor: tensor[..., :1], *here, KEY, "exp_avg"), "has shape (8, 1)"
    yield "a terabyte", put(huge(2**20, 2**20), *here, KEY, "tensor"), "has shape (1048576, 1048576)"
    yield "whole numbers", put(lambda tensor: tensor.int(), *here, KEY, "tensor"), "torch.int32"
    yield "complex numbers", put(lambda tensor: tensor.cfloat(), *here, KEY, "tensor"), "torch.complex64"
    yield "more bits", put(lambda tensor: tensor.double(), *here, KEY, "tensor"), "torch.float64"
    yield "fewer bits", put(lambda tensor: tensor.half(), *here, STAGE, "tensor"), "torch.float16"
    yield "a moment with more bits", put(lambda tensor: tensor.double(), *here, KEY, "exp_avg"), "torch.float64"
    yield "a sparse tensor", put(lambda tensor: tensor.to_sparse(), *here, KEY, "tensor"), "sparse"
    yield "a tensor of nothing", put(torch.empty(8, 64, device="meta"), *here, KEY, "tensor"), "checkpoint="
    yield "words for a tensor", put("x", *here, KEY, "tensor"), "is str"
    yield "a missing tensor", drop(*here, KEY), f"{KEY} is missing"
    yield "another tensor", put(lambda states: states | {"x": states[KEY]}, *here), "tied_lora.x is not one of"
    yield "another tensor of a long name", put(lambda states: states | {"x\n" * 5000: 1}, *here), "tied_lora.x x"
    yield "no tensors", put({}, *here), "is missing"
    yield "a list of tensors", put([1], *here), "tied_lora is list"
    yield "another scheme", put(lambda all: {"vera": all["tied_lora"]}, "adapters"), "adapters.tied_lora is missing"
    yield "a scheme too many", put(lambda all: all | {"vera": {}}, "adapters"), "adapters.vera is not one of"
    yield "no adapters", drop("adapters"), "adapters is missing"
    yield "adapters that are none", put(None, "adapters"), "adapters is NoneType"
    yield "a missing moment", drop(*here, KEY, "exp_avg"), f"{KEY}.exp_avg is missing"
    yield "a count of words", put("x", *here, KEY, "step"), f"{KEY}.step is str"
    yield "a count of NaN", put(torch.tensor(NAN), *here, KEY, "step"), f"{KEY}.step is"
    yield "settings of words", put("x", *here, KEY, "settings"), f"{KEY}.settings is 'x'"
    yield "no rate", drop(*here, KEY, "settings", "lr"), "settings.lr is missing"
    yield "an infinite rate", put(INFINITE, *here, KEY, "settings", "lr"), "settings.lr is inf"
    yield "settings that name tensors", put([], *here, KEY, "settings", "params"), "settings.params"
    yield "settings of another scheme", put("vera", *here, KEY, "settings", "adapter"), "settings.adapter"
    yield "rules that are none", put([], "drawing_rules"), "drawing_rules"
    yield "a rule that is none", put([2], "drawing_rules", "tied_lora"), "drawing_rules"
    yield "tensors of the base", put(
        {"model.decoder.final_layernorm.weight": torch.zeros(64)}, "state_dict"
    ), "state_dict"  # fmt: skip
    yield "words for tensors of the base", put("x", "state_dict"), "state_dict"
    yield (
        "a state of another optimizer",
        put([{"state": {}, "param_groups": []}], "optimizer_states"),
        ("optimizer_states"),
    )
    yield "no state of an optimizer", drop("optimizer_states"), "optimizer_states"


def first(content: dict) -> str:
    return next(name for name in content["state_dict"] if "linear_in" in name)


def nemos_cases():
    """Of a checkpoint of NeMo's methods in one file: ``state_dict`` and the optimizer's own state."""

    def weight(change):
        return changed(
            lambda content: content["state_dict"].update(
                {first(content): change(content["state_dict"][first(content)])}
            )
        )

    def moment(change, kind="exp_avg"):
        def changing(content):
            optimizer = content["optimizer_states"][0]
            state = next(iter(optimizer.get("optimizer", optimizer)["state"].values()))
            state[kind] = change(state[kind])

        return changed(changing)

    yield "NaN in a tensor", weight(filled(NAN)), "has NaN or infinity"
    yield "one column", weight(lambda tensor: tensor[..., :1]), "has shape"
    yield "more bits", weight(lambda tensor: tensor.double()), "torch.float64"
    yield "words for a tensor", weight(lambda tensor: "x"), "is str"
    yield "a missing tensor", changed(lambda content: content["state_dict"].__delitem__(first(content))), "missing"
    yield "another tensor", put(torch.ones(1), "state_dict", "x"), "state_dict.x is not one of"
    yield "no tensors", put([], "state_dict"), "state_dict must hold"
    yield "infinity in a moment", moment(filled(INFINITE)), "has NaN or infinity"
    yield "a moment of one column", moment(lambda tensor: tensor[..., :1]), "has shape"
    yield "a moment of words", moment(lambda tensor: "x"), "not a number"
    yield "adapters of ours", put({}, "adapters"), "adapters is not one of"
    yield "no state of an optimizer", put([], "optimizer_states"), "optimizer_states must be"
    yield "a missing state of an optimizer", drop("optimizer_states"), "optimizer_states must be"


def copies_cases():
    """Of a checkpoint in bfloat16: the float32 copies of what is trained, beside the optimizer's own state."""

    where = ("optimizer_states", 0, "fp32_from_fp16_params")
    one = "fp32_from_fp16_params.0.0"

    def copy(change):
        return put(change, *where, 0, 0)

    def under_the_former_name(content):
        groups = content["optimizer_states"][0].pop(where[-1])
        content["optimizer_states"][0]["fp32_from_fp16"] = [[copy * NAN for copy in group] for group in groups]

    yield "NaN in a copy", copy(filled(NAN)), f"{one} has NaN or infinity"
    yield "infinity in the last copy", put(filled(INFINITE), *where, -1, -1), "has NaN or infinity"
    yield "a copy of one column", copy(lambda tensor: tensor[..., :1]), f"{one} has shape"
    yield "a copy with fewer bits", copy(lambda tensor: tensor.bfloat16()), "torch.bfloat16 instead of torch.float32"
    yield "a copy of words", copy("x"), f"{one} is str"
    yield "a copy of a terabyte", copy(huge(2**20, 2**20)), f"{one} has shape (1048576, 1048576)"
    yield "a missing copy", put(lambda group: group[1:], *where, 0), "fp32_from_fp16_params must hold ["
    yield "a group too many", put(lambda groups: [*groups, groups[0]], *where), "fp32_from_fp16_params must hold ["
    yield "copies of words", put("x", *where), "fp32_from_fp16_params must hold lists"
    yield "groups of words", put(["x"], *where), "fp32_from_fp16_params must hold lists"
    yield "no copies", drop(*where), "fp32_from_fp16_params must hold lists"
    yield "NaN under their former name", changed(under_the_former_name), f"{one} has NaN or infinity"


def named(cases, *marks):
    return [pytest.param(bad, word, id=name, marks=marks) for name, bad, word in cases]


def refused(run, bad, word, tmp_path):
    path = tmp_path / run.last.name
    path.write_bytes(bad(run))
    said = run.continue_from(path)
    assert word in said, said


@pytest.mark.parametrize(("bad", "word"), named([*any_file_cases(), *ours_cases()]))
def test_a_checkpoint_of_ours(run, bad, word, tmp_path):
    refused(run("tied_lora"), bad, word, tmp_path)


@pytest.mark.parametrize(("bad", "word"), [*named(any_file_cases(), pytest.mark.thorough), *named(nemos_cases())])
def test_a_checkpoint_of_a_method_of_nemos(run, bad, word, tmp_path):
    refused(run("lora"), bad, word, tmp_path)


@pytest.mark.parametrize(("bad", "word"), named(copies_cases()))
def test_a_checkpoint_in_bfloat16(run, bad, word, tmp_path):
    refused(run("lora in bfloat16"), bad, word, tmp_path)


def of_a_piece(change):
    return lambda path: [change(one) for one in path.glob("*.distcp")]


@pytest.mark.parametrize(
    "change",
    {
        "a list of pieces that calls": lambda path: (path / ".metadata").write_bytes(pickle.dumps(CALL)),
        "common.pt that calls": lambda path: (path / "common.pt").write_bytes(files.saved({"x": CALL})),
        "a missing piece": of_a_piece(Path.unlink),
        "pieces cut off": of_a_piece(lambda one: one.write_bytes(one.read_bytes()[:-600])),
        "another format": lambda path: (path / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "a file too many": lambda path: (path / "x.pt").write_bytes(files.saved(CALL)),
    }.items(),
    ids=lambda case: case[0],
)
def test_a_checkpoint_in_pieces(run, change, tmp_path):
    found = run("none")
    path = Path(shutil.copytree(found.last, tmp_path / found.last.name))
    change[1](path)
    found.continue_from(path)


@pytest.mark.slow
def test_the_script_ends_in_one_line_and_runs_only_what_its_command_line_trusts(run, tmp_path):
    from nemo_tiedlora.files import sha256_of

    found = run("tied_lora")
    folder = Path(shutil.copytree(found.folder, tmp_path / "copy"))
    (last,) = folder.rglob("*-last.ckpt")
    last.write_bytes(put(CALL, "x")(found))

    def script(*more):
        own = [
            f"exp_manager.exp_dir={folder / 'runs'}" if "exp_dir" in one else one
            for one in settings(folder, "tied_lora")
        ]
        return forked.script(SCRIPT, *own, *more, cwd=tmp_path)

    code, _, err = script()
    assert code == 2 and err.count("\n") == 1 and str(last) in err, err[-2000:]
    digest = sha256_of(last)
    assert f"trust_sha256={digest}" in err
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "theirs.yaml").write_text(f"# @package _global_\ntrust_sha256: {digest}\n")
    for refused in (
        (f"hydra.searchpath=[{tmp_path / 'conf'}]", "+theirs@_global_=theirs"),
        ("trust_sha256=abc",),
        (f"trust_sha256={digest}", "-m"),
    ):
        code, _, err = script(*refused)
        assert code == 2 and err.count("\n") == 1, err[-2000:]
    assert not CANARY.exists()
    code, _, err = script(f"trust_sha256={digest}")
    assert code == 0 and CANARY.exists(), err[-2000:]
    CANARY.unlink()
