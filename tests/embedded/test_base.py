"""The built-in base: what is packed from the files that come with the package, and what it can do."""

import distutils.core
import os
import subprocess
import sys
import threading
from collections import defaultdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import forked
import plain_llama
import pytest
import torch
import toy
from safetensors.torch import load

from nemo_tiedlora.checkpoint.base import open_base
from nemo_tiedlora.embedded import base as embedded
from nemo_tiedlora.embedded import language, tasks, tokenizer
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.job import pretrain

ROOT = Path(__file__).parents[2]
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@pytest.fixture(scope="module")
def weights():
    """The weights that come with the package."""
    return load(embedded.shipped(embedded.WEIGHTS))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nemo_tiedlora"


def test_every_process_packs_the_same_bytes(tmp_path):
    code = "import sys; from nemo_tiedlora.embedded.base import packed; sys.stdout.buffer.write(packed())"
    code += "; assert not {'nemo', 'megatron', 'lightning'} & set(sys.modules)"
    other = toy.FRESH | dict(PYTHONPATH=str(ROOT), PYTHONHASHSEED="7", TZ="Asia/Tokyo", LC_ALL="C")
    packed = subprocess.run([sys.executable, "-c", code], env=other, cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    assert packed.stdout == embedded.packed()


def test_all_that_come_at_once_find_one_whole_file(cache, monkeypatch):
    content = bytes(2**24)  # long enough for others to come while it is written
    monkeypatch.setattr(embedded, "packed", lambda: content)
    for _ in range(3):
        found, start = [], threading.Barrier(4)

        def come(found=found, start=start):
            start.wait()
            path = embedded.base()
            found.append((path, path.read_bytes() == content))

        threads = [threading.Thread(target=come) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        path = found[0][0]
        assert found == [(path, True)] * 4 and list(cache.iterdir()) == [path]
        path.unlink()


def test_a_cached_file_is_used_again_unless_it_is_damaged(cache):
    path = embedded.base()
    assert path.parent == cache and path.suffix == ".nemo"
    os.utime(path, (1, 1))
    assert embedded.base() == path and path.stat().st_mtime == 1
    path.write_bytes(path.read_bytes()[:-2048])
    assert embedded.base() == path and path.read_bytes() == embedded.packed()


@pytest.mark.parametrize("name", [embedded.WEIGHTS, embedded.TOKENIZER])
def test_a_damaged_installation_is_named(name, cache, tmp_path, monkeypatch):
    files = {other: (embedded.FOLDER / other).read_bytes() for other in embedded.SHA256}
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    for other, content in files.items():
        (tmp_path / other).write_bytes(content)
    (tmp_path / name).write_bytes(files[name][:-1] + bytes([files[name][-1] ^ 1]))
    with pytest.raises(UsageError, match=f"{name}.*damaged.*install nemo_tiedlora again"):
        embedded.base()
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match=f"{name}.*No such file.*install nemo_tiedlora again"):
        embedded.base()
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_ends_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="XDG_CACHE_HOME='.*/file': .* cannot be kept .* a folder that can be written"):
        embedded.base()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", _no_home)
    with pytest.raises(UsageError, match="XDG_CACHE_HOME=None: .* a folder that can be written"):
        embedded.base()


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_the_files_are_part_of_an_installation(monkeypatch):
    monkeypatch.chdir(ROOT)
    package = distutils.core.run_setup("setup.py", stop_after="init").get_command_obj("build_py")
    package.ensure_finalized()
    installed = {name: files for name, _, _, files in package.data_files}
    assert set(installed["nemo_tiedlora.embedded"]) == set(embedded.SHA256)


def test_documents_fit():
    pieces = tokenizer.load(embedded.FOLDER / embedded.TOKENIZER)
    for about, exercises in islice(language.documents(pretrain.SEED), 500):
        texts = [str(about), *(text for e in exercises for text in (e.question, e.answer))]
        assert sum(map(len, pieces.encode(texts))) + len(exercises) <= pretrain.LENGTH + 1


def test_its_file_is_read_without_nemo(weights, tmp_path):
    with open_base(embedded.base()) as file:
        file.write(tmp_path / "halved.nemo", file.config, ["mlp.linear_fc2"], lambda path, layer, weight: weight / 2)
        checksums = file.checksums(list(LINEARS))
        for path in LINEARS:
            for layer in range(4):
                assert torch.equal(file.weight(path, layer), weights[f"decoder.layers.{path}.weight"][layer])
    with open_base(tmp_path / "halved.nemo") as halved:
        changed = halved.checksums(list(LINEARS))
        assert torch.equal(halved.weight(LINEARS[3], 2), weights[f"decoder.layers.{LINEARS[3]}.weight"][2] / 2)
    assert [path for path in LINEARS if changed[path] != checksums[path]] == ["mlp.linear_fc2"]


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_two_processes_load_their_parts(weights, tmp_path, layout):
    forked.ranks(2, _save_parts, embedded.base(), {f"{layout}_model_parallel_size": 2}, tmp_path)
    parts = [part for rank in range(2) for part in torch.load(tmp_path / f"{rank}.pt", weights_only=True)]
    loaded = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
    for name, place, part in parts:
        region = loaded[name][tuple(slice(*ends) if isinstance(ends, tuple) else ends for ends in place)]
        region.copy_(part[tuple(map(slice, region.shape))])  # some layouts need a longer vocabulary
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert sum(part.numel() for _, _, part in parts) < 1.05 * sum(weight.numel() for weight in weights.values())


def _save_parts(path, layout, folder):
    """Of the base under a layout: the parts of its weights that this rank has, and where in the whole they belong."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from nemo_tiedlora import platform

    with platform.host():
        state = _restored(path, **layout).model.sharded_state_dict()
        apply_factories(state)
        parts = [
            (part.key, [(i.start, i.stop) if isinstance(i, slice) else i for i in part.global_slice()], part.data)
            for part in nested_values(state)
            if isinstance(part, ShardedTensor)
        ]
        torch.save(parts, folder / f"{os.environ['RANK']}.pt")


def _restored(path, **overrides):
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from omegaconf import open_dict

    config = MegatronGPTModel.restore_from(str(path), return_config=True)
    with open_dict(config):
        config.update(overrides)
    trainer = toy.trainer(config)
    return MegatronGPTModel.restore_from(str(path), override_config_path=config, trainer=trainer)


def test_the_command_makes_such_files(weights, tmp_path):
    command = "-m", "nemo_tiedlora.job.pretrain", "--out", tmp_path / "new", "--steps", 2
    code, said, problems = forked.script(*command, cwd=tmp_path)
    assert code == 0, problems
    made = {name: (tmp_path / "new" / name).read_bytes() for name in embedded.SHA256}
    assert [line.split() for line in said.splitlines()] == [
        [name, sha256(content).hexdigest()] for name, content in made.items()
    ]
    new = load(made[embedded.WEIGHTS])
    assert {name: (weight.shape, weight.dtype) for name, weight in new.items()} == {
        name: (weight.shape, weight.dtype) for name, weight in weights.items()
    }
    assert all(weight.isfinite().all() for weight in new.values())
    assert made[embedded.TOKENIZER] == tokenizer.train(tmp_path / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def model():
    """The base as NeMo loads it, answering prompts greedily."""
    from nemo_tiedlora import platform

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its operators are too small to share
    with platform.host(), toy.clean_megatron():
        restored = _restored(embedded.base())
        module, pieces = restored.model.cuda().eval(), restored.tokenizer

        @torch.no_grad()
        def logits(tokens: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(tokens.shape[1]).expand_as(tokens).cuda()
            return module(tokens.cuda(), positions, None)

        def answers(prompts: list[str], longest: int = 10) -> list[str]:
            tokens = [pieces.text_to_ids(prompt) for prompt in prompts]
            lengths = defaultdict(list)  # prompts of one length need no padding
            for index, ids in enumerate(tokens):
                lengths[len(ids)].append(index)
            said = {}
            for length, indices in lengths.items():
                batch = torch.tensor([tokens[index] for index in indices]).cuda()
                for _ in range(longest):
                    batch = torch.cat([batch, logits(batch)[:, -1:].argmax(-1)], 1)
                    if (batch[:, length:] == pieces.eos_id).any(1).all():
                        break
                for index, ids in zip(indices, batch[:, length:].tolist(), strict=True):
                    said[index] = pieces.ids_to_text(ids[: [*ids, pieces.eos_id].index(pieces.eos_id)])
            return [said[index] for index in range(len(prompts))]

        yield SimpleNamespace(answers=answers, logits=logits, config=restored.cfg)
    torch.set_num_threads(threads)


def test_nemo_computes_what_the_weights_say(model, weights):
    tokens = torch.randint(tokenizer.VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = plain_llama.logits(weights, tokens, embedded.MODEL)
    assert expected.std() > 1
    torch.testing.assert_close(model.logits(tokens).cpu().double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_base_cannot_do_the_tasks(model, task):
    rows = tasks.rows(task, "test", 100)
    said = model.answers([row["input"] for row in rows])
    assert sum(a == row["output"] for a, row in zip(said, rows, strict=True)) < 10


def test_the_base_has_its_skills(model):
    asked = [
        (f"{about} {exercise.question}", exercise.answer)
        for about, exercises in islice(language.documents(seed=987), 50)
        for exercise in exercises
    ]
    said = model.answers([prompt for prompt, _ in asked])
    assert sum(a == answer for a, (_, answer) in zip(said, asked, strict=True)) > 0.9 * len(asked)


def test_the_base_is_llama_like(model):
    config = model.config
    assert config.num_query_groups < config.num_attention_heads
    assert (config.normalization, config.activation, config.bias) == ("rmsnorm", "fast-swiglu", False)
    assert config.position_embedding_type == "rope" and config.encoder_seq_length >= 512
