"""Trains and evaluates cells on one loaded base."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_suite.backends import Backend
from benchmark_suite.backends.protocol import Progress, Trained, Training
from benchmark_suite.metrics import METRICS, Score
from benchmark_suite.runner.cell import Cell, read
from benchmark_suite.runner.log import LOG, logged
from benchmark_suite.runner.memory import PeakMemory
from benchmark_suite.task import Prediction, Task
from nemo_tiedlora.facade import replacing, write_text

if TYPE_CHECKING:
    from torch import Tensor

#: Starts of a cell that ended without a result (killed, out of memory) before it counts as failed.
ATTEMPTS = 2


class Runner:
    """Everything a cell needs, loaded once.

    Args:
        backend: what trains, on the base of all cells; the runner ends it.
        results: folder with one folder per cell.
        tasks: the tasks in use, by id, with their data.
    """

    def __init__(self, backend: Backend, results: Path, tasks: dict[str, Task]):
        self.backend, self.results, self.tasks = backend, results, tasks

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.backend.__exit__(*exception)

    def state(self, cell: Cell) -> str:
        """``new``, ``trained``, ``done`` or ``failed``."""
        result = read(cell.folder(self.results) / "result.json")
        status = result["status"] if result else "new"
        if status in ("done", "failed"):
            return status
        started = read(cell.folder(self.results) / "started.json") or {"attempts": 0}
        return "failed" if started["attempts"] >= ATTEMPTS else status

    def train(self, cell: Cell, progress: Progress | None = None) -> dict[str, Any]:
        """Train a cell and evaluate it on the validation split."""
        with self._recorded(cell) as result, PeakMemory() as memory:
            training = self._training(cell)
            self.backend.load(training)
            folder, started = cell.folder(self.results), time.perf_counter()
            with self.backend.trained(training, progress=progress) as trained:
                predictions = self._predictions(trained, cell, "validation")
                scores = self._scores(cell, predictions, "validation")
                result["validation"] = _values(scores)
                LOG.info("validation: %s", _told(scores))
                adapter_bytes = trained.save(folder)
                _save_weights(folder / "weights.safetensors", trained.trainable)
                facts = trained.facts
                result |= trained.sizes | {
                    "status": "trained",
                    "adapter_bytes": adapter_bytes,
                    "tokens_per_second": round(facts.tokens / max(facts.seconds, 1e-9)),
                    "steps": facts.steps,
                    "best_step": facts.best_step,
                    "validation_losses": facts.losses,
                }
            result["seconds"] = round(time.perf_counter() - started, 2)
        if result["status"] != "failed":
            result["peak_memory_bytes"] = memory.bytes
            self._write(cell, result)
        return result

    def test(self, cell: Cell) -> dict[str, Any]:
        """Evaluate a trained cell, chosen by validation, on the test split; once."""
        from safetensors.torch import load_file

        folder = cell.folder(self.results)
        with self._recorded(cell) as result:
            weights = load_file(folder / "weights.safetensors")
            with self.backend.trained(self._training(cell), weights) as trained:
                predictions = {
                    split: self._predictions(trained, cell, split) for split in self.tasks[cell.task.id].tests
                }
            result["metrics"] = {}
            for split, found in predictions.items():
                scores = self._scores(cell, found, split)
                result["metrics"] |= _values(scores, split.removeprefix("test"))
                self._write_predictions(cell, found, scores, split)
                LOG.info("%s: %s", split, _told(scores))
            result |= {"status": "done", "selected": True}
        self._write(cell, result)
        if result["status"] == "done":
            (folder / "weights.safetensors").unlink()
        return result

    def lost(self, cell: Cell) -> dict[str, Any]:
        """Record that another learning rate was better on the validation split."""
        known = read(cell.folder(self.results) / "result.json") or self._record(cell)
        result = known | {"status": "done", "selected": False}
        self._write(cell, result)
        (cell.folder(self.results) / "weights.safetensors").unlink(missing_ok=True)
        return result

    def result(self, cell: Cell) -> dict[str, Any]:
        """What is known of a cell."""
        result = read(cell.folder(self.results) / "result.json") or self._record(cell)
        if self.state(cell) == "failed" and result["status"] != "failed":  # killed every time
            error = f"ended without a result {ATTEMPTS} times (killed, or out of memory)"
            result |= {"status": "failed", "error": error}
            self._write(cell, result)
        return result

    def forget(self, cell: Cell) -> None:
        """Remove a cell's results, to run it again."""
        shutil.rmtree(cell.folder(self.results), ignore_errors=True)

    @contextmanager
    def _recorded(self, cell: Cell) -> Iterator[dict[str, Any]]:
        """The cell's record, to be filled in; an error becomes part of it and ends nothing else."""
        folder = cell.folder(self.results)
        result = read(folder / "result.json") or self._record(cell)
        started = read(folder / "started.json") or {"attempts": 0}
        write_text(folder / "started.json", json.dumps({"attempts": started["attempts"] + 1}))
        try:
            with logged(folder / "log.txt", self.backend.loggers()):
                LOG.info("%s, %s, %s", cell.task.id, cell.variant.name, cell.name)
                try:
                    yield result
                except Exception:
                    LOG.exception("failed")
                    raise
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            result |= {"status": "failed", "error": message}
            self._write(cell, result)
        except BaseException:  # stopped by the user or the cluster, which is no fault of the cell
            write_text(folder / "started.json", json.dumps(started))
            raise
        else:
            (folder / "started.json").unlink()

    def _record(self, cell: Cell) -> dict[str, Any]:
        return {
            "cell": cell.hash,
            "task": cell.task.id,
            "variant": cell.variant.name,
            "scheme": cell.variant.scheme,
            "rank": cell.rank,
            "seed": cell.seed,
            "lr": cell.lr,
            "status": "new",
            "error": None,
            "primary": cell.task.primary,
            "settings": cell.variant.settings_at(cell.rank),
            "recipe": cell.task.to_dict()["recipe"],
            "limit": cell.limit,
            "precision": cell.precision,
            "host": cell.host,
            "head": cell.head,
            "base": self.backend.base,
            "base_sha256": cell.base_sha256,
            "data_sha256": cell.data_sha256,
            "versions": {name: version(name) for name in ("nemo_tiedlora", *self.backend.packages(cell.variant))},
        }

    def _training(self, cell: Cell) -> Training:
        task = self.tasks[cell.task.id]
        return Training(
            variant=cell.variant,
            rank=cell.rank,
            train=task.examples("train"),
            validation=task.examples("validation"),
            recipe=cell.task.recipe,
            lr=cell.lr,
            seed=cell.seed,
            files=self.results / ".data" / f"{cell.task.id}-{cell.data_sha256[:12]}",
            head=cell.task.head_outputs if cell.head else None,
            score=partial(self._score_of_head, cell) if cell.head else None,
        )

    def _score_of_head(self, cell: Cell, outputs: Sequence[Sequence[float]]) -> float:
        predictions = [_said(cell, each) for each in outputs]
        return self.tasks[cell.task.id].score(predictions, "validation")[cell.task.primary].value

    def _predictions(self, trained: Trained, cell: Cell, split: str) -> list[Prediction]:
        examples, prediction = self.tasks[cell.task.id].examples(split), cell.task.prediction
        if cell.head:
            return [_said(cell, each) for each in trained.outputs([example.texts for example in examples])]
        if prediction.kind == "generate":
            texts = trained.generate([each.prompt for each in examples], prediction.max_tokens or 0)
            return [_stopped(text, prediction.stop) for text in texts]
        found = iter(trained.log_likelihoods([query for each in examples for query in each.queries]))
        return [[next(found)[0] for _ in each.queries] for each in examples]

    def _scores(self, cell: Cell, predictions: list[Prediction], split: str) -> dict[str, Score]:
        return self.tasks[cell.task.id].score(predictions, split)

    def _write_predictions(
        self, cell: Cell, predictions: list[Prediction], scores: dict[str, Score], split: str
    ) -> None:
        examples = self.tasks[cell.task.id].examples(split)
        lines = []
        for number, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
            single = {name: score.per_example[number] for name, score in scores.items() if score.per_example}
            row = {"id": example.id, "prediction": prediction, "target": example.target, "scores": single}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        name = f"predictions{split.removeprefix('test')}.jsonl"
        write_text(cell.folder(self.results) / name, "".join(lines))

    def _write(self, cell: Cell, result: dict[str, Any]) -> None:
        write_text(cell.folder(self.results) / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _values(scores: dict[str, Score], suffix: str = "") -> dict[str, dict[str, Any]]:
    return {
        f"{name}{suffix}": {
            "value": score.value,
            "count": score.count,
            "scale": METRICS[name].scale,
            "higher_is_better": True,
            "signature": score.signature,
        }
        for name, score in scores.items()
    }


def _told(scores: dict[str, Score]) -> str:
    return ", ".join(f"{name} {METRICS[name].scale * score.value:.2f}" for name, score in scores.items())


def _stopped(text: str, stops: list[str]) -> str:
    """The text before the first stop string, without the space it begins with."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))].removeprefix(" ")


def _said(cell: Cell, outputs: Sequence[float]) -> Prediction:
    """What a head says, as a prediction: a score for each choice, or a number, which metrics read as text."""
    if cell.task.head and cell.task.head.number:
        return repr(outputs[0])
    return list(outputs)


def _save_weights(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    from safetensors.torch import save_file

    with replacing(path) as unfinished:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
