"""Evaluation on a loaded base: what is generated and how likely an answer is do not depend on the batch."""

import pytest
import torch
import toy
from nemo.collections.nlp.models.language_modeling import megatron_base_model

from nemo_tiedlora.embedded import base as embedded_base
from nemo_tiedlora.embedded import tasks
from nemo_tiedlora.job.callbacks.divergence import Diverged
from nemo_tiedlora.job.workbench import Job, Trained, workbench


@pytest.fixture(scope="module")
def bench():
    with toy.clean_megatron(), workbench(embedded_base.base()) as bench:
        yield bench


@pytest.fixture(scope="module")
def trained(bench):
    return Trained(bench.model, facts=None)


@pytest.fixture(scope="module")
def rows():
    """Prompts of several lengths with their answers."""
    found = tasks.rows("before", "test", 9, 1)
    return [(row["input"] * (1 + number % 3), row["output"]) for number, row in enumerate(found)]


@pytest.mark.parametrize("batch_size", [2, 4, 64])
def test_greedy_text_is_the_same_for_any_batch_size(trained, rows, batch_size):
    prompts = [prompt for prompt, _ in rows]
    one_by_one = trained.generate(prompts, tokens=6, batch_size=1)
    assert trained.generate(prompts, tokens=6, batch_size=batch_size) == one_by_one
    assert len(set(one_by_one)) > 1


def test_log_likelihoods_are_those_of_one_pair_at_a_time(trained, rows):
    pairs = [(prompt, f" {answer}") for prompt, answer in rows]
    together = trained.log_likelihoods(pairs)
    tokenizer = trained.model.tokenizer
    for (context, continuation), (value, greedy) in zip(pairs, together, strict=True):
        ids = torch.tensor([tokenizer.text_to_ids(context + continuation)])
        start = len(tokenizer.text_to_ids(context))
        with torch.no_grad():
            scores = trained.model.model(ids, torch.arange(ids.shape[1])[None], None)
        expected = torch.log_softmax(scores[0, start - 1 : -1].double(), -1)
        answer = ids[0, start:]
        assert value == pytest.approx(float(expected.gather(1, answer[:, None]).sum()), abs=1e-4)
        assert greedy == bool((expected.argmax(1) == answer).all())


def job(folder, **settings):
    files = tasks.write(folder)
    sizes = {"steps": 20, "batch_size": 4, "micro_batch_size": 4, "max_length": 48, "validate_every": 20}
    return Job("tied_lora", {"tied_lora_tuning": {}}, files["train"], files["validation"], **sizes, **settings)


def test_a_job_that_diverges_says_so_and_leaves_the_base_as_it_was(bench, trained, rows, tmp_path):
    before = trained.log_likelihoods([rows[0]])
    with pytest.raises(Diverged, match=r"not finite .*it is 1000000\.0"), bench.trained(job(tmp_path, lr=1e6)):
        pass
    assert trained.log_likelihoods([rows[0]]) == before


def test_gradient_norms_end_a_job_where_losses_do_not(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(megatron_base_model, "clip_grad_norm_fp32", lambda **_: torch.tensor(float("inf")))
    not_finite = pytest.raises(Diverged, match="the gradient norm was not finite at steps 1 to 3")
    with not_finite, bench.trained(job(tmp_path, lr=1e-4)):
        pass
