"""A run whose numbers are no longer finite ends, and keeps the last checkpoint from when they were."""

from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

from nemo_tiedlora.errors import RunError

#: So many steps in a row with a loss or a gradient norm that is not finite end a run.
PATIENCE = 3
#: Reading values waits for the device, so the steps' values are read this often (steps), and before anything is saved.
READ_EVERY = 10
#: A loss scale below this would make gradients smaller, not larger: the overflow is not the scale's.
SMALLEST_SCALE = 1.0


class Diverged(RunError):
    """Losses, gradients or weights of a run are not finite."""


class DivergenceCheck(Callback):
    """Raises ``Diverged``, on all ranks in the same step, before anything that is not finite is saved or exported.

    What ends a run: a loss that is not finite in three steps in a row; a gradient norm that is not, in three steps
    in a row that the gradient scaler did not skip; an overflow at the scaler's smallest scale; trained weights that are
    not finite when a validation begins, a checkpoint is saved or training ends; and a validation or test loss that is
    not finite, also before training. Without gradient clipping (or with Megatron's distributed optimizer, which clips
    for itself) there is no gradient norm; the weights then tell one step later.

    Put it before callbacks that save.
    """

    def __init__(self):
        # Step; is its loss, its norm not finite; was it skipped.
        self._unread: list[tuple[int, torch.Tensor, bool]] = []
        self._in_a_row = {"loss": 0, "gradient norm": 0}

    @torch.no_grad()
    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        skipped = bool(getattr(scaler, "optimizer_update_skipped", False))  # the scaler has asked the device already
        if skipped and scaler.get_scale() < SMALLEST_SCALE:
            what = f"gradients overflowed at step {trainer.global_step} even at a loss scale of {SMALLEST_SCALE:g}"
            raise _diverged(trainer, model, what)
        loss = outputs["loss"].detach()
        values = torch.stack([value.to(loss.device).float().reshape(()) for value in (loss, _norm(trainer, loss))])
        self._unread.append((trainer.global_step, ~values.isfinite(), skipped))
        if len(self._unread) >= READ_EVERY:
            self._read(trainer, model)

    def on_validation_start(self, trainer, model):
        if trainer.state.fn == TrainerFn.FITTING:
            self._check(trainer, model)

    def on_validation_end(self, trainer, model):
        _check_loss("validation", trainer, model)

    def on_test_end(self, trainer, model):
        _check_loss("test", trainer, model)

    def on_save_checkpoint(self, trainer, model, checkpoint):
        self._check(trainer, model)

    def on_train_end(self, trainer, model):
        self._check(trainer, model)

    def _check(self, trainer, model) -> None:
        self._read(trainer, model)
        if not _all_finite(trainer, model):
            raise _diverged(trainer, model, f"trained weights are not finite after step {trainer.global_step}")

    def _read(self, trainer, model) -> None:
        """Count steps in a row; waits for the device."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        found = _on_any_rank(torch.stack([flags for _, flags, _ in unread]), trainer).tolist()
        for (step, _, skipped), (loss, norm) in zip(unread, found, strict=True):
            for name, is_bad in (("loss", loss), ("gradient norm", norm and not skipped)):
                self._in_a_row[name] = self._in_a_row[name] + 1 if is_bad else 0
                if self._in_a_row[name] == PATIENCE:
                    what = f"the {name} was not finite at steps {step - PATIENCE + 1} to {step}"
                    raise _diverged(trainer, model, what)


def _norm(trainer, loss: torch.Tensor) -> torch.Tensor:
    """The step's gradient norm as NeMo logs it, on the first rank for all; 0, where the loss is, if there is none.

    Not from ``trainer.callback_metrics``, which brings every number of the progress bar to the CPU.
    """
    logged = trainer._results.get("configure_gradient_clipping.grad_norm")
    return loss.new_zeros(()) if logged is None else logged._forward_cache


@torch.no_grad()
def _all_finite(trainer, model) -> bool:
    """Whether all trained weights are, on all ranks, the optimizer's copies of them included."""
    trained = {id(tensor): tensor for tensor in model.parameters() if tensor.requires_grad}
    for optimizer in trainer.optimizers:
        trained |= {id(tensor): tensor for group in optimizer.param_groups for tensor in group["params"]}
    tensors = [tensor for tensor in trained.values() if tensor.numel()]
    largest = torch._foreach_norm(tensors, float("inf")) if tensors else []  # a 2-norm may overflow by itself
    bad = ~torch.stack([value.float() for value in largest]).isfinite().all() if tensors else torch.tensor(False)
    return not _on_any_rank(bad.to(model.device), trainer)


def _on_any_rank(flags: torch.Tensor, trainer) -> torch.Tensor:
    if trainer.world_size == 1:
        return flags
    flags = flags.int()
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return flags.bool()


def _check_loss(name: str, trainer, model) -> None:
    """All ranks know this loss."""
    loss = float(trainer.callback_metrics.get(f"{name}_loss", 0.0))
    if loss - loss == 0:
        return
    if trainer.state.fn == TrainerFn.FITTING:
        raise _diverged(trainer, model, f"the {name} loss is {loss} after step {trainer.global_step}")
    raise Diverged(
        f"the {name} loss is {loss}: the base or the adapter is not finite in this precision, "
        f"or rows of model.data.{name}_ds have no answer within max_seq_length"
    )


def _diverged(trainer, model, what: str) -> Diverged:
    precision = str(getattr(trainer.precision_plugin, "precision", ""))
    advice = [
        f"a lower model.optim.lr (it is {model.cfg.optim.lr})",
        "a longer warm-up (model.optim.sched.warmup_steps)",
        *(["trainer.precision=bf16"] if precision.startswith("16") else []),
    ]
    return Diverged(
        f"the run diverged: {what}. Try {', '.join(advice)}, or look at the data. "
        f"No adapter was exported; {_kept(trainer.checkpoint_callback)}"
    )


def _kept(saver) -> str:
    found = Path(saver.dirpath).glob("*-last*") if saver is not None and saver.dirpath else []
    complete = [
        path
        for path in found
        if (path.suffix == ".ckpt" or path.is_dir()) and not NeMoModelCheckpoint.is_checkpoint_unfinished(path)
    ]
    if not complete:
        return "there is no checkpoint from before"
    return f"the last good checkpoint is {max(complete, key=lambda path: path.stat().st_mtime)}"
