"""Training: AdamW, clipped gradients, a learning rate that rises and falls, validations, the best weights kept."""

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmark_suite.backends.hf.methods import Full
from benchmark_suite.backends.hf.objectives import Saying, Writing
from benchmark_suite.backends.protocol import Progress, Training
from nemo_tiedlora.facade import RunError

LOG = logging.getLogger("benchmark_suite")
#: So many steps in a row with a loss or a gradient norm that is not finite end a training.
PATIENCE = 3


@dataclass
class Measured:
    """See ``protocol.Facts``."""

    steps: int = 0
    best_step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)


class Settings(NamedTuple):
    """Of AdamW, and of its learning rate.

    Args:
        share: (step from 0, steps of warm-up, steps) → share of the learning rate.
    """

    share: Callable[[int, int, int], float]
    betas: tuple[float, float]
    weight_decay: float


def cosine(step: int, warmup: int, steps: int) -> float:
    """As NeMo's CosineAnnealing."""
    if warmup and step <= warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def linear(step: int, warmup: int, steps: int) -> float:
    """As transformers' ``get_linear_schedule_with_warmup``."""
    return step / warmup if step < warmup else (steps - step) / (steps - warmup)


#: Text is trained as NeMo's workbench does it.
WRITING = Settings(cosine, (0.9, 0.98), 0.01)
#: Heads are trained as the papers on GLUE did it, with the defaults of transformers' Trainer.
SAYING = Settings(linear, (0.9, 0.999), 0.0)


def fit(
    model: nn.Module, method: Full, objective: Writing | Saying, training: Training, progress: Progress | None
) -> tuple[Measured, dict[str, Tensor]]:
    """Train until the steps are done or no validation is better.

    Returns:
        What was measured, and the best weights by parameter name.

    Raises:
        RunError: losses, gradients or weights are not finite.
    """
    recipe, facts = training.recipe, Measured()
    settings = WRITING if training.head is None else SAYING
    copies = Copies(method.groups(training.lr))
    optimizer = torch.optim.AdamW(copies.groups, training.lr, settings.betas, weight_decay=settings.weight_decay)
    scheduler = LambdaLR(optimizer, lambda step: settings.share(step, training.warmup, recipe.steps))
    method.begin(optimizer)
    best, worse, bad = Best(training), 0, 0
    interval = min(recipe.val_interval, recipe.steps)
    for step, batch in enumerate(objective.batches(), 1):
        started, loss = time.perf_counter(), torch.zeros(())
        model.train()
        for part, tokens in objective.losses(batch):
            part.backward()
            loss, facts.tokens = loss + part.detach().cpu(), facts.tokens + tokens
        norm = copies.gather()
        optimizer.step()
        scheduler.step()
        copies.give()
        facts.seconds, facts.steps = facts.seconds + time.perf_counter() - started, step
        bad = 0 if loss.isfinite() and norm.isfinite() else bad + 1
        if bad == PATIENCE:
            what = "gradient norm" if loss.isfinite() else "loss"
            raise _diverged(f"the {what} was not finite at steps {step - PATIENCE + 1} to {step}", training)
        if progress:
            progress(step, recipe.steps)
        if step % interval == 0:
            model.eval()
            value, said = objective.validate()
            facts.losses.append((step, value))
            if not math.isfinite(value):
                raise _diverged(f"the validation loss is {value} after step {step}", training)
            if best.is_better(step, value, said, model):
                facts.best_step, worse = step, 0
            else:
                worse += 1
            if recipe.patience is not None and worse >= recipe.patience:
                break
    return facts, best.weights


class Best:
    """The weights of the best validation so far."""

    def __init__(self, training: Training):
        self.training, self.value = training, -math.inf
        self.weights: dict[str, Tensor] = {}

    def is_better(self, step: int, loss: float, said: list[list[float]] | None, model: nn.Module) -> bool:
        """Whether a validation is better than all before; then its weights are kept."""
        LOG.info("step %d of %d: validation loss %.4f", step, self.training.recipe.steps, loss)
        value = -loss
        if self.training.score and said is not None:
            value = self.training.score(said)
            LOG.info("step %d of %d: validation score %.4f", step, self.training.recipe.steps, value)
        if value <= self.value:
            return False
        self.value, self.weights = value, copy.deepcopy(trainable(model))
        return True


class Copies:
    """Trained tensors in float32 for the optimizer, where the model has them in less.

    Args:
        groups: an optimizer's.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.groups = [group | {"params": [self._precise(each) for each in group["params"]]} for group in groups]

    def _precise(self, tensor: Tensor) -> Tensor:
        own = tensor if tensor.dtype == torch.float32 else tensor.detach().float().requires_grad_(True)
        self.pairs.append((tensor, own))
        return own

    def gather(self) -> Tensor:
        """Take the gradients over, clipped; their norm before."""
        for tensor, own in self.pairs:
            if own is not tensor:
                own.grad = None if tensor.grad is None else tensor.grad.float()
        return nn.utils.clip_grad_norm_([own for _, own in self.pairs], 1.0).cpu()

    @torch.no_grad()
    def give(self) -> None:
        """Give the new values to the model, and drop the gradients."""
        for tensor, own in self.pairs:
            if own is not tensor:
                tensor.copy_(own)
            tensor.grad = own.grad = None


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by parameter name."""
    return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}


@torch.no_grad()
def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the model weights that were kept."""
    named = dict(model.named_parameters())
    for name, value in weights.items():
        named[name].copy_(value)


def _diverged(what: str, training: Training) -> RunError:
    return RunError(f"the run diverged: {what}. Try a lower learning rate (it is {training.lr:g}), or look at the data")
