"""What ends a run whose numbers are not finite, and what does not; with NeMo's own gradient scaler."""

from types import SimpleNamespace

import pytest
import torch
import toy

from nemo_tiedlora import platform

INF = float("inf")


@pytest.fixture
def world(tmp_path):
    with platform.host(), toy.one_process_world(tmp_path):
        yield


class Steps:
    """A trainer with what the check reads of one, and steps of a given loss and gradient norm."""

    def __init__(self, scaler=None):
        from lightning.pytorch.trainer.states import TrainerFn
        from omegaconf import OmegaConf

        from nemo_tiedlora.job.callbacks.divergence import DivergenceCheck

        self.check = DivergenceCheck()
        self.model = torch.nn.Linear(2, 1)
        self.model.device, self.model.cfg = torch.device("cpu"), OmegaConf.create({"optim": {"lr": 0.1}})
        self.trainer = SimpleNamespace(
            precision_plugin=SimpleNamespace(scaler=scaler, precision="16-mixed" if scaler else "32-true"),
            global_step=0, callback_metrics={}, _results={}, world_size=1, optimizers=[], checkpoint_callback=None,
            state=SimpleNamespace(fn=TrainerFn.FITTING),
        )  # fmt: skip

    def take(self, loss=1.0, norm=1.0):
        self.trainer.global_step += 1
        logged = SimpleNamespace(_forward_cache=torch.tensor(norm))
        self.trainer._results["configure_gradient_clipping.grad_norm"] = logged
        self.check.on_train_batch_end(self.trainer, self.model, {"loss": torch.tensor(loss)}, None, 0)

    def save(self):
        self.check.on_save_checkpoint(self.trainer, self.model, {})


@pytest.mark.parametrize("name", ["loss", "norm"])
@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_three_steps_in_a_row_end_a_run_and_two_do_not(world, name, value):
    from nemo_tiedlora.job.callbacks.divergence import Diverged

    steps = Steps()
    for bad in (1, 1, 0) * 10:  # longer than what is read at once
        steps.take(**({name: value} if bad else {}))
    steps.save()
    for _ in range(3):
        steps.take(**{name: value})
    with pytest.raises(Diverged, match=r"at steps 31 to 33\. Try a lower model\.optim\.lr \(it is 0\.1\)"):
        steps.save()


def test_steps_are_read_without_saving_too(world):
    from nemo_tiedlora.job.callbacks.divergence import READ_EVERY, Diverged

    steps = Steps()
    with pytest.raises(Diverged):
        for _ in range(READ_EVERY):
            steps.take(loss=INF)


@pytest.mark.parametrize("hook", ["on_validation_start", "on_train_end"])
def test_weights_that_are_not_finite_end_a_run(world, hook):
    from nemo_tiedlora.job.callbacks.divergence import Diverged

    steps = Steps()
    steps.take()
    with torch.no_grad():
        steps.model.weight[0, 0] = 3e38  # finite, though its square is not
    getattr(steps.check, hook)(steps.trainer, steps.model)
    with torch.no_grad():
        steps.model.weight[0, 1] = float("nan")
    with pytest.raises(Diverged, match="trained weights are not finite after step 1"):
        getattr(steps.check, hook)(steps.trainer, steps.model)
    copy = torch.tensor([INF])  # float32, where the model's own weights are of another type
    steps = Steps()
    steps.trainer.optimizers = [SimpleNamespace(param_groups=[{"params": [copy]}])]
    with pytest.raises(Diverged):
        steps.save()


def test_validation_losses_are_finite_before_training_too(world):
    from lightning.pytorch.trainer.states import TrainerFn

    from nemo_tiedlora.job.callbacks.divergence import Diverged

    steps = Steps()
    steps.trainer.callback_metrics["validation_loss"] = torch.tensor(float("nan"))
    with pytest.raises(Diverged, match="the validation loss is nan after step 0"):
        steps.check.on_validation_end(steps.trainer, steps.model)
    steps.trainer.state.fn = TrainerFn.VALIDATING
    with pytest.raises(Diverged, match=r"the adapter is not finite .* or rows of model\.data\.validation_ds"):
        steps.check.on_validation_end(steps.trainer, steps.model)


def test_overflows_end_a_run_only_at_the_smallest_scale(world, monkeypatch):
    """NeMo's scaler begins at 2³², so that a run's first thirty steps overflow."""
    from nemo.collections.nlp.parts.nlp_overrides import GradScaler

    from nemo_tiedlora.job.callbacks.divergence import Diverged

    # Without a GPU the scaler would do nothing; its arithmetic works on a CPU.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    scaler = GradScaler(init_scale=2.0**32, hysteresis=2)
    monkeypatch.undo()
    scaler._device = "cpu"
    steps = Steps(scaler)
    optimizer = torch.optim.SGD(steps.model.parameters(), lr=0.0)

    def step(largest):
        """Gradients overflow where they times the scale are more than ``largest``."""
        scaler.scale(torch.zeros(()))
        gradient = INF if scaler.get_scale() > largest else scaler.get_scale()
        for parameter in steps.model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.unscale_(optimizer)
        norm = float(steps.model.weight.grad.norm())
        scaler.step(optimizer)
        scaler.update()
        steps.take(norm=norm)

    for _ in range(40):
        step(65504.0)
    steps.save()
    assert scaler.optimizer_update_skipped is False and scaler.get_scale() == 2.0**15
    with pytest.raises(Diverged, match="even at a loss scale of 1. Try .*trainer.precision=bf16"):
        for _ in range(40):
            step(0.0)
    assert scaler.get_scale() == 0.5
