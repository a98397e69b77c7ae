"""NeMo: text is learned on a ``.nemo``, by the plugin's methods or NeMo's own."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_suite.backends.protocol import Progress, Training
from benchmark_suite.example import Example
from benchmark_suite.task_spec import TaskSpec
from benchmark_suite.variant_spec import STOCK, VariantSpec
from nemo_tiedlora.facade import (
    BUILTIN,
    METHODS,
    UsageError,
    base_at,
    check_fit,
    config_for,
    nemo_config,
    sha256_of,
    use_one_thread,
    write_text,
)

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_tiedlora.facade import Job, Workbench


class NemoBackend:
    """See ``protocol.Backend``.

    Args:
        base: as ``--base`` takes it: a ``.nemo``, or what is made one.

    Raises:
        UsageError: where the base is first asked for: there is none, or NeMo does not run it.
    """

    host = "nemo"

    def __init__(self, base: str | Path, precision: str = "32"):
        self.named, self.precision = base, precision
        self._bench: Workbench | None = None
        self._until_exit = ExitStack()

    def __enter__(self) -> "NemoBackend":
        return self

    def __exit__(self, *exception: object) -> None:
        self._until_exit.close()
        self._bench = None

    @cached_property
    def path(self) -> Path:
        """The ``.nemo``; made now if the base is something else."""
        if self.named == BUILTIN:
            use_one_thread()
        try:
            return base_at(self.named)
        except UsageError as error:
            if not (Path(self.named) / "config.json").is_file():
                raise
            way_out = f"{error.way_out}; --host hf trains on it without NeMo"
            raise UsageError(error.field, error.value, way_out) from None

    @property
    def base(self) -> str:
        return self.path.name

    @cached_property
    def base_sha256(self) -> str:
        return sha256_of(self.path)

    @property
    def bench(self) -> "Workbench":
        """The base in memory; loaded when the first cell needs it."""
        if self._bench is None:
            from nemo_tiedlora.facade import workbench

            self._bench = self._until_exit.enter_context(workbench(self.path, self.precision))
        return self._bench

    def loggers(self) -> Sequence[str]:
        """NeMo's and Lightning's."""
        import lightning.pytorch  # noqa: F401  (at its import it asks whether the root has handlers, and must find none)

        return "nemo_logger", "lightning.pytorch", "lightning.fabric"

    def packages(self, variant: VariantSpec) -> Sequence[str]:
        return "nemo_toolkit", "megatron-core", "torch"

    def runs(self, variant: VariantSpec) -> bool:
        """All but what is only in Hugging Face PEFT."""
        return not variant.is_peft

    def has_head(self, task: TaskSpec, wanted: bool | None) -> bool:
        """Never: NeMo's models write."""
        if wanted:
            raise UsageError("head", wanted, "on host nemo models learn text only; --host hf trains heads")
        return False

    def check(self, variant: VariantSpec, rank: int | None, head: bool) -> None:
        """Whether the method's settings fit the base's layers; NeMo checks those of its own schemes."""
        if not self.runs(variant):
            way_out = f"{variant.scheme} is Hugging Face PEFT's, which is on --host hf only"
            raise UsageError("variant", variant.name, way_out)
        if variant.scheme in METHODS:
            try:
                check_fit(config_for(variant.scheme, variant.settings_at(rank)), nemo_config(self.path, "base"))
            except UsageError as error:
                raise error.under(variant.name) from None

    def load(self, training: Training) -> None:
        assert self.bench

    @contextmanager
    def trained(
        self, training: Training, weights: "Mapping[str, Tensor] | None" = None, progress: Progress | None = None
    ) -> Iterator["NemoTrained"]:
        """By the workbench."""
        with self.bench.trained(_job(training), None if weights is None else dict(weights), progress) as trained:
            yield NemoTrained(trained, training)


class NemoTrained:
    """See ``protocol.Trained``; the workbench's, with what the suite records."""

    def __init__(self, trained: Any, training: Training):
        self.trained, self.training = trained, training
        self.facts = trained.facts
        self.generate, self.log_likelihoods = trained.generate, trained.log_likelihoods

    @property
    def trainable(self) -> "Mapping[str, Tensor]":
        return self.trained.trainable

    @property
    def sizes(self) -> dict[str, Any]:
        """The share is of LoRA on the same layers at the same rank; of QKV at rank 8 if there is none."""
        from nemo_tiedlora.facade import TiedConfig, lora_size, sizes

        variant, rank, model = self.training.variant, self.training.rank, self.trained.model.cfg
        trainable = sum(tensor.numel() for tensor in self.trainable.values())
        if variant.scheme in STOCK:
            percent = 100 * trainable / lora_size(TiedConfig(preset="LoRA", rank=rank or 8), model)
            return {"trainable": trainable, "stored": trainable, "percent_of_lora": round(percent, 2)}
        found = sizes(config_for(variant.scheme, variant.settings_at(rank)), model)
        return {"trainable": trainable, "stored": found.stored, "percent_of_lora": found.percent_of_lora}

    def save(self, folder: Path) -> int:
        """As ``adapter.nemo``."""
        path = folder / "adapter.nemo"
        self.trained.save(path)
        return path.stat().st_size

    def outputs(self, texts: Sequence[tuple[str, ...]]) -> list[list[float]]:
        raise NotImplementedError("NeMo's models have no heads")


def _job(training: Training) -> "Job":
    from nemo_tiedlora.facade import Job

    variant, recipe = training.variant, training.recipe
    settings = variant.settings_at(training.rank)
    if variant.scheme not in STOCK:
        settings = {"seed": training.seed} | settings
    return Job(
        scheme=variant.scheme,
        peft={variant.section: settings} if variant.section else {},
        train=_file(training.files, "train", training.train),
        validation=_file(training.files, "validation", training.validation),
        steps=recipe.steps,
        lr=training.lr,
        batch_size=recipe.batch_size,
        micro_batch_size=training.micro_batch,
        max_length=recipe.max_seq_length,
        validate_every=recipe.val_interval,
        warmup=training.warmup,
        patience=recipe.patience,
        seed=training.seed,
    )


def _file(folder: Path, split: str, examples: Sequence[Example]) -> Path:
    """Rows as NeMo reads them, in one file for all cells of the same data."""
    path = folder / f"{split}.jsonl"
    if not path.exists():
        rows = ({"input": each.prompt, "output": each.target} for each in examples)
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
