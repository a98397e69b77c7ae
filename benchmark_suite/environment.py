"""Tasks as Gymnasium environments: an episode is one pass through a split, and a step answers one example.

import gymnasium
import benchmark_suite.environment  # registers them

env = gymnasium.make("benchmark_suite/gsm8k-v1", data_root="data")
prompt, info = env.reset(seed=0, options={"split": "train", "shuffle": True})
prompt, reward, terminated, truncated, info = env.step("... #### 42")
"""

import string
from pathlib import Path
from typing import Any

import gymnasium

from benchmark_suite import registry
from benchmark_suite.example import Example
from benchmark_suite.task import Prediction, Task
from nemo_tiedlora.facade import UsageError, closest

NAMESPACE = "benchmark_suite"
#: What ``reset`` may be told.
OPTIONS: dict[str, Any] = {"split": "validation", "shuffle": False}


class AnyText(gymnasium.spaces.Text):
    """Texts of any characters and any length; its samples are short and printable."""

    def __init__(self):
        super().__init__(max_length=64, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def __repr__(self) -> str:
        return "AnyText()"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, AnyText)


class TaskEnvironment(gymnasium.Env[str, str]):
    """A task, an example after the other.

    An observation is what a model reads: the prompt; of a task with a prompt for each choice, all of them, a line each.
    An action is the answer: a text, or of a ranked task one of ``info["choices"]``, where any other text is wrong.
    The reward is the primary metric on this one example, or for a metric that needs a whole corpus what comes closest
    to it: sentence BLEU, whether the choice is right, or the negative distance from the true number.

    ``reset`` takes ``options``: ``split`` (``validation``, or ``train``, or one to test on, which is opened only then)
    and ``shuffle``, which draws the examples' order by ``seed``; else they come in the split's.

    ``info`` has the ``id`` and the ``choices`` of the example that is asked; after a step also the ``target`` of the
    answered one; and after the last one, when ``terminated`` is true, the ``scores``: every metric over the episode.

    Args:
        id: of the task. data_root, limit: as for ``benchmark_suite.load_task``.
        render_mode: ``ansi``: ``render`` gives the observation.

    Raises:
        UsageError: an unknown task, option or split, with the closest one; an answer that is no text; or a step when no
            example is left.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}  # Gymnasium wants a rate for texts too

    def __init__(
        self, id: str, data_root: str | Path | None = None, limit: int | None = None, render_mode: str | None = None
    ):
        self.task: Task = registry.load_task(id, data_root, limit)
        self.observation_space, self.action_space = AnyText(), AnyText()
        self.render_mode = render_mode
        self._examples: list[Example] = []
        self._predictions: list[Prediction] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        for name in options or {}:
            if name not in OPTIONS:
                raise UsageError("options", name, closest(name, OPTIONS))
        chosen = OPTIONS | (options or {})
        self._examples = list(self.task.examples(chosen["split"]))
        if chosen["shuffle"]:
            self._examples = [self._examples[at] for at in self.np_random.permutation(len(self._examples))]
        self._predictions = []
        return self._observation(), self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if len(self._predictions) == len(self._examples):
            raise UsageError("step", action, "no example is left; call reset first")
        if not isinstance(action, str):
            raise UsageError("action", action, "an answer is a text")
        example = self._examples[len(self._predictions)]
        prediction = self._prediction(action, example)
        reward = self.task.reward(prediction, example)
        self._predictions.append(prediction)
        info = self._info() | {"target": example.target}
        terminated = len(self._predictions) == len(self._examples)
        if terminated:
            scores = self.task.score_of(self._predictions, self._examples)
            info["scores"] = {name: score.value for name, score in scores.items()}
        return self._observation(), float(reward), terminated, False, info

    def render(self) -> str | None:
        return self._observation() if self.render_mode == "ansi" else None

    def _asked(self) -> Example | None:
        at = len(self._predictions)
        return self._examples[at] if at < len(self._examples) else None

    def _observation(self) -> str:
        example = self._asked()
        if example is None:
            return ""
        if len({prompt for prompt, _ in example.queries}) < 2:
            return example.prompt
        # The prompt of the right choice alone would tell which one that is.
        lines = zip(example.choices, example.queries, strict=True)
        return "\n".join(f"{choice}: {prompt}{continuation}" for choice, (prompt, continuation) in lines)

    def _info(self) -> dict[str, Any]:
        example = self._asked()
        return {"id": example and example.id, "choices": list(example.choices) if example else []}

    def _prediction(self, answer: str, example: Example) -> Prediction:
        if self.task.spec.prediction.kind == "generate":
            return answer
        texts = [choice.strip() for choice in example.choices]
        wrong = (example.right + 1) % len(texts)
        chosen = texts.index(answer.strip()) if answer.strip() in texts else wrong
        return [0.0 if number == chosen else -1.0 for number in range(len(example.choices))]


def register(id: str) -> None:
    """Register a task as ``benchmark_suite/<id>`` in Gymnasium's registry."""
    name = f"{NAMESPACE}/{id}"
    if name not in gymnasium.registry:
        gymnasium.register(name, entry_point=f"{__name__}:TaskEnvironment", kwargs={"id": id})


for _id in registry.list_tasks():
    register(_id)
