"""Trains and evaluates cells on one loaded base."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_suite.metrics import METRICS, Score
from benchmark_suite.runner.cell import Cell, read
from benchmark_suite.runner.log import LOG, logged
from benchmark_suite.runner.memory import PeakMemory
from benchmark_suite.task import Prediction, Task
from benchmark_suite.variant_spec import STOCK
from nemo_tiedlora.facade import replacing, write_text

if TYPE_CHECKING:
    from nemo_tiedlora.facade import Job, Workbench

#: Starts of a cell that ended without a result (killed, out of memory) before it counts as failed.
ATTEMPTS = 2
#: Padded tokens of a micro-batch, at most.
TOKENS = 8192

Progress = Callable[[int, int], None]


class Runner:
    """Everything a cell needs, loaded once.

    Args:
        base: a base model, ``.nemo``.
        results: folder with one folder per cell.
        tasks: the tasks in use, by id, with their data.
        precision: of the base in memory, and so of all cells.
    """

    def __init__(self, base: Path, results: Path, tasks: dict[str, Task], precision: str = "32"):
        self.base, self.results, self.tasks, self.precision = base, results, tasks, precision
        self._bench: Workbench | None = None
        self._until_exit = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._until_exit.__exit__(*exception)

    @property
    def bench(self) -> "Workbench":
        """The base in memory; loaded when the first cell needs it."""
        if self._bench is None:
            from nemo_tiedlora.facade import workbench

            self._bench = self._until_exit.enter_context(workbench(self.base, self.precision))
        return self._bench

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
            bench = self.bench  # loading it belongs to no cell
            folder, started = cell.folder(self.results), time.perf_counter()
            with bench.trained(self._job(cell), progress=progress) as trained:
                predictions = self._predictions(trained, cell, "validation")
                scores = self._scores(cell, predictions, "validation")
                result["validation"] = _values(scores)
                LOG.info("validation: %s", _told(scores))
                trained.save(folder / "adapter.nemo")
                _save_weights(folder / "weights.safetensors", trained.trainable)
                facts = trained.facts
                result |= {
                    "status": "trained",
                    "trainable": sum(tensor.numel() for tensor in trained.trainable.values()),
                    "adapter_bytes": (folder / "adapter.nemo").stat().st_size,
                    "tokens_per_second": round(facts.tokens / max(facts.seconds, 1e-9)),
                    "steps": facts.steps,
                    "best_step": facts.best_step,
                    "validation_losses": facts.losses,
                }
            result["seconds"] = round(time.perf_counter() - started, 2)
        if result["status"] != "failed":
            result |= self._sizes(cell, result["trainable"])
            result["peak_memory_bytes"] = memory.bytes
            self._write(cell, result)
        return result

    def test(self, cell: Cell) -> dict[str, Any]:
        """Evaluate a trained cell, chosen by validation, on the test split; once."""
        from safetensors.torch import load_file

        folder = cell.folder(self.results)
        with self._recorded(cell) as result:
            weights = load_file(folder / "weights.safetensors")
            with self.bench.trained(self._job(cell), weights) as trained:
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
            with logged(folder / "log.txt"):
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
            "base": self.base.name,
            "base_sha256": cell.base_sha256,
            "data_sha256": cell.data_sha256,
            "versions": _versions(),
        }

    def _job(self, cell: Cell) -> "Job":
        from nemo_tiedlora.facade import Job

        recipe, settings = cell.task.recipe, cell.variant.settings_at(cell.rank)
        if cell.variant.scheme not in STOCK:
            settings = {"seed": cell.seed} | settings
        files = self._files(cell)
        return Job(
            scheme=cell.variant.scheme,
            peft={cell.variant.section: settings} if cell.variant.section else {},
            train=files["train"],
            validation=files["validation"],
            steps=recipe.steps,
            lr=cell.lr,
            batch_size=recipe.batch_size,
            micro_batch_size=_micro_batch(recipe.batch_size, recipe.max_seq_length),
            max_length=recipe.max_seq_length,
            validate_every=recipe.val_interval,
            warmup=min(recipe.warmup_steps, recipe.steps - 1),
            patience=recipe.patience,
            seed=cell.seed,
        )

    def _files(self, cell: Cell) -> dict[str, Path]:
        """Training and validation rows as files, one pair for all cells of the same data."""
        folder = self.results / ".data" / f"{cell.task.id}-{cell.data_sha256[:12]}"
        files = {split: folder / f"{split}.jsonl" for split in ("train", "validation")}
        for split, path in files.items():
            if not path.exists():
                rows = [
                    {"input": each.prompt, "output": each.target} for each in self.tasks[cell.task.id].examples(split)
                ]
                write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return files

    def _predictions(self, trained, cell: Cell, split: str) -> list[Prediction]:
        examples, prediction = self.tasks[cell.task.id].examples(split), cell.task.prediction
        if prediction.kind == "generate":
            texts = trained.generate([each.prompt for each in examples], prediction.max_tokens)
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

    def _sizes(self, cell: Cell, trainable: int) -> dict[str, Any]:
        """Share of the parameters of LoRA on the same layers at the same rank; of QKV at rank 8 if there is none."""
        from nemo_tiedlora.facade import TiedConfig, config_for, lora_size, sizes

        model = self.bench.model.cfg
        if cell.variant.scheme in STOCK:
            percent = 100 * trainable / lora_size(TiedConfig(preset="LoRA", rank=cell.rank or 8), model)
            return {"stored": trainable, "percent_of_lora": round(percent, 2)}
        found = sizes(config_for(cell.variant.scheme, cell.variant.settings_at(cell.rank)), model)
        return {"stored": found.stored, "percent_of_lora": found.percent_of_lora}

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


def _micro_batch(batch_size: int, length: int) -> int:
    fitting = [size for size in range(1, batch_size + 1) if batch_size % size == 0 and size * length <= TOKENS]
    return max(fitting, default=1)


def _save_weights(path: Path, tensors: dict) -> None:
    from safetensors.torch import save_file

    with replacing(path) as unfinished:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("nemo_tiedlora", "nemo_toolkit", "megatron-core", "torch")}
