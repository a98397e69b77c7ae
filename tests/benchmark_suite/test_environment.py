"""Every task as a Gymnasium environment."""

import json
import re
import warnings
from pathlib import Path

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from test_specs import GOOD

import benchmark_suite
import benchmark_suite.environment
from benchmark_suite import declared
from nemo_tiedlora.errors import UsageError


def right(env):
    """What an agent that knows the answer says."""
    example = env.task.examples("validation")[len(env._predictions)]
    if env.task.spec.prediction.kind == "rank":
        return example.choices[example.label]
    return example.references[0] if env.task.spec.primary in ("pearson", "squad_em") else example.target


@pytest.mark.parametrize("id", benchmark_suite.list_tasks())
def test_gymnasium_s_own_check_has_nothing_to_say(id, data_root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(benchmark_suite.make(id, data_root, limit=2))


@pytest.mark.parametrize("id", benchmark_suite.list_tasks())
def test_an_episode_is_a_split_and_right_answers_are_worth_most(id, data_root):
    env, rewards, info = benchmark_suite.make(id, data_root, limit=2), [], {}
    prompt, _ = env.reset()
    terminated = False
    while not terminated:
        assert prompt
        prompt, reward, terminated, truncated, info = env.step(right(env))
        rewards.append(reward)
        assert not truncated
    assert len(rewards) == len(env.task.examples()) and min(rewards) == max(rewards) and prompt == ""
    assert list(info["scores"]) == env.task.spec.metrics
    best = 100 if env.task.spec.primary == "bleu" else 1
    assert info["scores"][env.task.spec.primary] == pytest.approx(best)
    with pytest.raises(UsageError, match="no example is left; call reset first"):
        env.step("anything")
    env.reset()
    assert env.step("zzz")[1] < rewards[0]


def test_it_is_in_gymnasium_s_registry(data_root):
    env = gymnasium.make("benchmark_suite/boolq-v1", data_root=data_root, limit=2, render_mode="ansi")
    prompt, info = env.reset(seed=1)
    assert env.render() == prompt and info["choices"] == ["no", "yes"]
    assert env.unwrapped.spec.id == "benchmark_suite/boolq-v1"


def test_a_seed_says_the_order_and_the_split_is_an_option(data_root):
    env = benchmark_suite.make("before-v1")
    plain = env.reset()[1]["id"]
    orders = []
    for seed in (0, 0, 1):
        order = [env.reset(seed=seed, options={"split": "train", "shuffle": True})[1]["id"]]
        for _ in range(5):
            order.append(env.step("x")[4]["id"])
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]
    assert all(id.startswith("train/") for id in orders[0]) and plain == "validation/0"
    assert [split for split, _ in env.task.accesses] == ["validation", "train"], "the test split stays shut"


def test_prompts_that_differ_by_choice_do_not_tell_the_right_one(data_root):
    env = benchmark_suite.make("winogrande-v1", data_root)
    prompt, info = env.reset()
    example = env.task.examples()[0]
    assert prompt != example.prompt
    for choice, (begin, end) in zip(info["choices"], example.queries, strict=True):
        assert f"{choice}: {begin}{end}" in prompt.splitlines()


def test_what_is_not_known_is_named(data_root):
    env = benchmark_suite.make("boolq-v1", data_root)
    with pytest.raises(UsageError, match="options='splitt': .*did you mean 'split'"):
        env.reset(options={"splitt": "train"})
    with pytest.raises(UsageError, match="split='tran'.*did you mean 'train'"):
        env.reset(options={"split": "tran"})
    env.reset()
    with pytest.raises(UsageError, match="an answer is a text"):
        env.step(1)


def test_a_task_of_one_s_own_is_registered_too(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"thing": "sky", "label": 1}) + "\n")
    (tmp_path / "own.yaml").write_text(declared.text(GOOD | {"id": "own-colours-v1"}))
    benchmark_suite.register_folder(tmp_path)
    prompt, _ = gymnasium.make("benchmark_suite/own-colours-v1").reset()
    assert prompt == "Colour of sky:"


def test_the_agent_of_the_documentation_learns_the_rule(capsys):
    page = (Path(__file__).parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    said = capsys.readouterr().out
    rule, score = re.fullmatch(r"(.*) \{'exact_match': (.*)\}\n", said).groups()
    assert rule == "the word before" and float(score) > 0.8
