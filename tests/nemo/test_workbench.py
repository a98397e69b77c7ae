"""Evaluation on a loaded base: what is generated and how likely an answer is do not depend on the batch."""

import pytest
import torch
import toy

from nemo_tiedlora.embedded import base as embedded_base
from nemo_tiedlora.embedded import tasks
from nemo_tiedlora.nemo.workbench import Trained, workbench


@pytest.fixture(scope="module")
def trained():
    with toy.clean_megatron(), workbench(embedded_base.base()) as bench:
        yield Trained(bench.model, facts=None)


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
