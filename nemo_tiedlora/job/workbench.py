"""One loaded base, on which adapters are trained and tried one after another.

    with workbench(base) as bench:
        with bench.trained(Job(...)) as trained:
            texts = trained.generate(prompts, tokens=16)

Loading a base and importing NeMo take longer than training many an adapter; what a job does to the model (classes,
modules, settings, weights) is taken back at its end.
"""

import copy
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import tensor_parallel
from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
from omegaconf import DictConfig, OmegaConf
from torch import nn

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.job.callbacks.divergence import DivergenceCheck
from nemo_tiedlora.job.callbacks.measured import Measured
from nemo_tiedlora.job.generate import Generator
from nemo_tiedlora.job.host_config import host_config
from nemo_tiedlora.nemo.model import build_model, build_trainer
from nemo_tiedlora.platform.quiet import quiet

LOG = logging.getLogger(__name__)

#: What NeMo's own schemes want to be told and a job need not say, by section of ``model.peft``.
_TENSORS = {
    "adapter_dropout": 0.0,
    "column_init_method": "xavier",
    "row_init_method": "zero",
    "layer_selection": None,
    "weight_tying": False,
    "position_embedding_strategy": None,
}
STOCK_SETTINGS: dict[str, dict[str, Any]] = {
    "lora_tuning": {"variant": "nemo", "target_modules": ["attention_qkv"], "alpha": 32, **_TENSORS},
    "adapter_tuning": {
        "norm_position": "pre", "norm_type": "mixedfusedlayernorm", **_TENSORS,
    },
    "p_tuning": {"bottleneck_dim": 64, "embedding_dim": 64, "init_std": 0.023},
    "ia3_tuning": {"layer_selection": None},
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What to train, and how.

    Args:
        scheme: as in ``model.peft.peft_scheme``. peft: the section ``model.peft``.
        train, validation: JSONL files with ``input`` and ``output``; the model learns the output.
        steps: optimizer steps, at most. lr, weight_decay, warmup: of AdamW with a cosine schedule.
        batch_size: rows per step. micro_batch_size: rows at a time.
        max_length: tokens of a row; longer inputs lose their beginning.
        validate_every: steps. patience: validations without a lower loss before training ends; None: never.
        seed: of the order of rows, of dropout, and of the adapter's start unless its settings name one.
        optimizer: NeMo's name of it.
    """

    scheme: str
    peft: dict[str, Any]
    train: Path
    validation: Path
    steps: int
    lr: float
    batch_size: int
    micro_batch_size: int
    max_length: int
    validate_every: int
    weight_decay: float = 0.01
    warmup: int = 0
    patience: int | None = None
    seed: int = 0
    optimizer: str = "adamw"


@dataclass
class Facts:
    """What a job measured.

    Args:
        steps: taken. best_step: the one whose weights were kept. best_loss: validation loss there.
        seconds: of training steps, validation excluded. tokens: token positions trained on, padding included.
        losses: (step, validation loss) of every validation.
    """

    steps: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    seconds: float = 0.0
    tokens: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)


class Trained:
    """A base with a trained adapter, to be used inside ``Workbench.trained``."""

    def __init__(self, model, facts: Facts):
        self.model, self.facts = model, facts

    @property
    def trainable(self) -> dict[str, torch.Tensor]:
        """What was trained, by parameter name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def save(self, path: Path) -> None:
        """Write the adapter (a whole model, if that is what was trained) as a ``.nemo``."""
        with quiet():
            self.model.save_to(str(path))

    def generate(self, prompts: Sequence[str], tokens: int, batch_size: int = 64) -> list[str]:
        """Greedy completions, in order. Prompts of like length go together; no text depends on its batch.

        A prompt that leaves no room for the answer in the model's context loses its beginning.
        """
        tokenizer, room = self.model.tokenizer, self.model.cfg.encoder_seq_length - tokens
        if room < 1:
            raise UsageError("tokens", tokens, f"the base's context has {self.model.cfg.encoder_seq_length}")
        ids = [tokenizer.text_to_ids(prompt) for prompt in prompts]
        fitting = [
            prompt if len(own) <= room else tokenizer.ids_to_text(own[-room:])
            for prompt, own in zip(prompts, ids, strict=True)
        ]
        order = sorted(range(len(prompts)), key=lambda number: len(ids[number]))
        self.model.eval()
        texts = Generator(self.model).generate([fitting[number] for number in order], tokens, batch_size=batch_size)
        by_number = dict(zip(order, texts, strict=True))
        return [by_number[number] for number in range(len(prompts))]

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[tuple[str, str]], batch_tokens: int = 8192) -> list[tuple[float, bool]]:
        """For every (context, continuation): the log-likelihood of the continuation, and whether greedy gives it.

        Args:
            batch_tokens: padded tokens of a batch; pairs of like length go together.
        """
        tokenizer, device = self.model.tokenizer, next(self.model.parameters()).device
        rows = []
        for number, (context, continuation) in enumerate(pairs):
            whole = tokenizer.text_to_ids(context + continuation)
            start = len(tokenizer.text_to_ids(context)) if context else 0
            limit = self.model.cfg.encoder_seq_length
            whole, start = whole[-limit:], start - max(0, len(whole) - limit)
            rows.append((number, whole, max(1, start)))
        rows.sort(key=lambda row: len(row[1]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        self.model.eval()
        batch: list = []
        for row in [*rows, None]:
            if batch and (row is None or (len(batch) + 1) * len(row[1]) > batch_tokens):
                longest = max(len(whole) for _, whole, _ in batch)
                tokens = torch.zeros(len(batch), longest, dtype=torch.long, device=device)
                for line, (_, whole, _) in zip(tokens, batch, strict=True):
                    line[: len(whole)] = torch.tensor(whole)
                positions = torch.arange(longest, device=device).expand_as(tokens)
                scores = torch.log_softmax(self.model.model(tokens, positions, None).float(), -1)
                for line, (number, whole, start) in zip(scores, batch, strict=True):
                    answer = torch.tensor(whole[start:], device=device)
                    predicted = line[start - 1 : len(whole) - 1]
                    total = predicted.gather(1, answer[:, None]).sum().item()
                    results[number] = total, bool((predicted.argmax(1) == answer).all())
                batch = []
            batch.append(row)
        return results


class Workbench:
    """A base in memory."""

    def __init__(self, model, cfg: DictConfig, scratch: str):
        self.model, self.cfg, self.scratch = model, cfg, scratch

    @contextmanager
    def trained(
        self,
        job: Job,
        weights: dict[str, torch.Tensor] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Trained]:
        """Train what ``job`` describes, or take ``weights`` that an equal job trained.

        Args:
            progress: called after every step with the number of steps done and to do.

        Raises:
            Diverged: losses, gradients or weights are not finite.
        """
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(_taken_back(self.model, whole=job.scheme in ("none", "selective")))
            cfg = _config(self.cfg, job, self.scratch)
            _seed(job.seed)
            facts = Facts()
            best = _Best(facts, job.patience, progress)
            trainer, _ = build_trainer(cfg, [DivergenceCheck(), best])
            self.model.set_trainer(trainer)
            for name in ("peft", "data", "optim", "seed", "micro_batch_size", "global_batch_size"):
                OmegaConf.update(self.model._cfg, name, cfg.model[name], merge=False, force_add=True)
            reconfigure_num_microbatches_calculator(0, None, job.batch_size, job.micro_batch_size, 1)
            make = PEFT_CONFIG_MAP[job.scheme]
            if job.scheme == "selective":
                _select(self.model, job.peft["selective_tuning"]["tunable_base_param_names"])
            elif make is not None:
                self.model.add_adapter(make(self.model.cfg))
            else:
                self.model.unfreeze()
            if weights is None:
                trainer.fit(self.model)
            else:
                self.model.setup_optimizer_param_groups()  # says what is trained
                self.model.setup_complete = True
                best.weights = weights
            best.put_back(self.model)
            yield Trained(self.model, facts)


@contextmanager
def workbench(base: Path, precision: str = "32") -> Iterator[Workbench]:
    """Load ``base``, a ``.nemo`` of a Megatron-core GPT, in this process.

    Args:
        precision: ``32``; or ``bf16`` for weights and activations of bfloat16, the optimizer keeping float32 copies of
            what it trains (NeMo's ``megatron_amp_O2``).
    """
    from nemo_tiedlora import platform

    rows = {"train_ds": _data([], 1, 1, True, 8, 0), "validation_ds": _data([], 1, 1, False, 8, 0)}
    cfg = host_config(
        precision, megatron_amp_O2=precision != "32", restore_from_path=str(base), data={"chat": False, **rows}
    )
    with ExitStack() as stack:
        with quiet():
            stack.enter_context(platform.host())
            trainer, _ = build_trainer(cfg, [])
            model = build_model(cfg, Path(base), trainer)
            # NeMo's index of the rows' files is this process's own: others may be at the same files.
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
        yield Workbench(model, cfg, scratch)


def _config(cfg: DictConfig, job: Job, scratch: str) -> DictConfig:
    cfg = copy.deepcopy(cfg)
    cfg.trainer.max_steps = job.steps
    cfg.trainer.val_check_interval = min(job.validate_every, job.steps)
    cfg.model.seed = job.seed
    sections = {name: STOCK_SETTINGS.get(name, {}) | settings for name, settings in job.peft.items()}
    cfg.model.peft = {"peft_scheme": job.scheme, "restore_from_path": None, **sections}
    sizes = job.batch_size, job.micro_batch_size
    cfg.model.micro_batch_size, cfg.model.global_batch_size = job.micro_batch_size, job.batch_size
    cfg.model.data = {
        "chat": False,
        "train_ds": _data([str(job.train)], *sizes, True, job.max_length, job.seed, scratch),
        "validation_ds": _data([str(job.validation)], *sizes, False, job.max_length, job.seed, scratch),
    }
    schedule = {"name": "CosineAnnealing", "warmup_steps": job.warmup, "constant_steps": 0, "min_lr": 0.0}
    optim = {"name": job.optimizer, "lr": job.lr, "weight_decay": job.weight_decay, "betas": [0.9, 0.98]}
    cfg.model.optim = {**optim, "sched": schedule}
    return cfg


def _data(
    files: list[str],
    batch_size: int,
    micro_batch_size: int,
    train: bool,
    max_length: int,
    seed: int,
    index: str | None = None,
) -> dict:
    section = {
        "file_names": files, "global_batch_size": batch_size, "micro_batch_size": micro_batch_size,
        "shuffle": bool(train), "num_workers": 0, "memmap_workers": 1, "pin_memory": False,
        "max_seq_length": max_length, "min_seq_length": 1, "drop_last": bool(train), "label_key": "output",
        "add_eos": True, "add_sep": False, "add_bos": False, "truncation_field": "input", "truncation_method": "left",
        "index_mapping_dir": index,
        "prompt_template": "{input} {output}", "global_sample_mapping": False, "seed": seed,
    }  # fmt: skip
    if train:
        return section | {"concat_sampling_probabilities": [1.0]}
    metric = {"name": "loss", "average": None, "num_classes": None}
    writing = {"write_predictions_to_file": False, "output_file_path_prefix": None, "tokens_to_generate": 0}
    return section | {"names": ["validation"], "metric": metric, **writing}


def _select(model, names: list[str]) -> None:
    """Train the base's parameters with one of ``names`` in their path; NeMo's own way refuses Megatron-core models."""
    model.use_peft = True
    model.freeze(training=True)
    model.adapter_keys = set()
    parameters = dict(model._unwrap_model().named_parameters(prefix="model"))
    model.tunable_base_param_keys = {name for name in parameters if set(names) & set(name.split("."))}
    if not model.tunable_base_param_keys:
        raise UsageError("tunable_base_param_names", names, "the base has no parameter of this name")
    for name in model.tunable_base_param_keys:
        parameters[name].requires_grad = True


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


class _Best(Measured):
    """Measures, keeps the weights of the lowest validation loss, and ends training when it no longer falls."""

    def __init__(self, facts: Facts, patience: int | None, progress: Callable[[int, int], None] | None):
        super().__init__()
        self.facts, self.patience, self.progress = facts, patience, progress
        self.weights: dict[str, torch.Tensor] = {}
        self._worse = 0

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, model, outputs, batch, batch_idx)
        self.facts.seconds, self.facts.tokens, self.facts.steps = self.seconds, self.tokens, self.steps
        if self.progress:
            self.progress(trainer.global_step, trainer.max_steps)

    def on_validation_end(self, trainer, model):
        loss = float(trainer.callback_metrics["validation_loss"])
        LOG.info("step %d of %d: validation loss %.4f", trainer.global_step, trainer.max_steps, loss)
        self.facts.losses.append((trainer.global_step, loss))
        if loss < self.facts.best_loss:
            self.facts.best_loss, self.facts.best_step, self._worse = loss, trainer.global_step, 0
            self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        else:
            self._worse += 1
            trainer.should_stop = self.patience is not None and self._worse >= self.patience

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> None:
        """Give the model the weights that were kept."""
        named = dict(model.named_parameters())
        for name, value in self.weights.items():
            named[name].copy_(value)


@contextmanager
def _taken_back(model: nn.Module, whole: bool) -> Iterator[None]:
    """Undo at the end whatever is done to a model's modules; to its weights too if ``whole``."""
    config = copy.deepcopy(model._cfg)
    modules = [(module, module.__class__, _shallow(module.__dict__)) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = [(tensor, tensor.detach().clone()) for tensor in model.parameters()] if whole else []
    try:
        yield
    finally:
        for module, kind, attributes in modules:
            object.__setattr__(module, "__class__", kind)
            module.__dict__.clear()
            module.__dict__.update(attributes)
        with torch.no_grad():
            for tensor, value in weights:
                tensor.copy_(value)
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)
            parameter.grad = None
        model._cfg = config


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy whose dictionaries (parameters, modules, hooks) are copies too."""
    return {name: copy.copy(value) if isinstance(value, dict) else value for name, value in attributes.items()}
