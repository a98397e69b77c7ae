"""Caching of the built-in base, and what the base can do (builds it where it is not cached: a minute or two)."""

import threading
import time
from collections import defaultdict
from itertools import islice
from types import SimpleNamespace

import pytest
import toy

from nemo_tiedlora.embedded import base as embedded
from nemo_tiedlora.embedded import language, tasks


def test_built_once_although_asked_for_twice_at_once(tmp_path, monkeypatch):
    built = []

    def build(path, progress):
        built.append(path)
        time.sleep(0.2)
        path.write_text("base")

    monkeypatch.setattr(embedded, "_build_elsewhere", build)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(embedded.base(progress=False))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and paths[0] == paths[1] and paths[0].read_text() == "base"
    assert paths[0].parent == tmp_path / "nemo_tiedlora"
    assert embedded.base(progress=False) == paths[0] and len(built) == 1


def test_a_failed_build_leaves_no_base_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # so that the child cannot start
    with pytest.raises(RuntimeError, match="pre-training the built-in base failed"):
        embedded.base(tmp_path, progress=False)
    assert not list(tmp_path.glob("*.nemo")) and not list(tmp_path.glob(".*.nemo*"))


def test_the_child_is_no_part_of_a_distributed_run(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept = embedded._single_process()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_JOB_ID", "OMP_NUM_THREADS"} & kept.keys()
    assert "PATH" in kept


def test_documents_fit(tmp_path):
    from nemo_tiedlora.embedded import tokenizer

    pieces = tokenizer.load(tokenizer.train(tmp_path / "tokenizer.model"))
    for about, exercises in islice(language.documents(embedded.SEED), 500):
        texts = [str(about), *(text for e in exercises for text in (e.question, e.answer))]
        assert sum(map(len, pieces.encode(texts))) + len(exercises) <= embedded.LENGTH + 1


@pytest.fixture(scope="module")
def model():
    """The cached base, answering prompts greedily."""
    path = embedded.base()
    from nemo_tiedlora import platform

    with platform.host(), toy.clean_megatron():
        import torch
        from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
        from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
        from omegaconf import OmegaConf

        config = MegatronGPTModel.restore_from(str(path), return_config=True)
        run = dict(trainer=embedded.TRAINER, model=config, exp_manager=dict(log_tflops_per_sec_per_gpu=False))
        trainer = MegatronLMPPTrainerBuilder(OmegaConf.create(run)).create_trainer()
        restored = MegatronGPTModel.restore_from(str(path), trainer=trainer)
        module, pieces = restored.model.cuda().eval(), restored.tokenizer

        @torch.no_grad()
        def answers(prompts: list[str], longest: int = 10) -> list[str]:
            tokens = [pieces.text_to_ids(prompt) for prompt in prompts]
            lengths = defaultdict(list)  # prompts of one length need no padding
            for index, ids in enumerate(tokens):
                lengths[len(ids)].append(index)
            said = {}
            for length, indices in lengths.items():
                batch = torch.tensor([tokens[index] for index in indices]).cuda()
                for _ in range(longest):
                    positions = torch.arange(batch.shape[1]).expand_as(batch).cuda()
                    batch = torch.cat([batch, module(batch, positions, None)[:, -1:].argmax(-1)], 1)
                for index, ids in zip(indices, batch[:, length:].tolist(), strict=True):
                    said[index] = pieces.ids_to_text(ids[: (ids + [pieces.eos_id]).index(pieces.eos_id)])
            return [said[index] for index in range(len(prompts))]

        yield SimpleNamespace(answers=answers, config=config)


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
