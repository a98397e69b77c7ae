"""transformers' Trainer and TRL's SFTTrainer, unchanged but for a callback; recomputation and autocast."""

import os
from unittest import mock

import pytest
import torch
import transformers
import trl
import twins
from accelerate.state import AcceleratorState
from datasets import Dataset
from saved_models import tokenizer

from nemo_tiedlora import huggingface
from nemo_tiedlora.errors import UsageError


@pytest.fixture(autouse=True)
def own_state():
    """That SFTTrainer asked for bfloat16 is kept for the whole process, in accelerate and in the environment."""
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


METHODS = {
    "DynaLoRA": ("dyna_lora", {"rank": 2, "active": 1, "period": 1, "lr_ratio": 4.0, "dropout": 0.2}),
    "CondLoRA": ("cond_lora", {"rank": 2, "lr_ratio": 4.0}),
}
ROWS = [{"prompt": f"what is {n} plus {n + 1}? ", "completion": f"it is {2 * n + 1}."} for n in range(8)]


def adapted(bases, method, **more):
    scheme, settings = METHODS[method]
    model = twins.transformers_model(bases("llama")[0])
    return huggingface.attach(model, scheme, ["attention_qkv"], **settings, **more)


def fine_tuned(bases, folder, method, steps, resume=None, **arguments):
    """Train with SFTTrainer; return what each step lost, what the method knows and the tensors."""
    adapter = adapted(bases, method)
    args = trl.SFTConfig(
        folder, max_steps=steps, per_device_train_batch_size=2, save_steps=2, learning_rate=1e-2, max_length=32,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, **arguments,
    )  # fmt: skip
    run = trl.SFTTrainer(
        adapter.model,
        args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer(folder / "tokenizer"),
        optimizers=(torch.optim.AdamW(adapter.parameter_groups(1e-2)), None),
        callbacks=[adapter.callback()],
    )
    run.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, adapter.variant.state_dict(), adapter.named_tensors()


@pytest.mark.parametrize("method", METHODS)
def test_sft_trains_and_goes_on_from_its_checkpoint_to_the_same_bits(method, bases, tmp_path):
    losses, knows, tensors = fine_tuned(bases, tmp_path / "whole", method, 4)
    assert losses[-1] < losses[0]
    fine_tuned(bases, tmp_path / "half", method, 2)
    checkpoint = str(tmp_path / "half" / "checkpoint-2")
    for restored in (False, True):
        rest, known, again = fine_tuned(
            bases, tmp_path / "rest", method, 4, checkpoint, restore_callback_states_from_checkpoint=restored
        )
        assert rest == losses and known == knows
        for key, tensor in tensors.items():
            assert torch.equal(again[key], tensor), key


def rows():
    draw = torch.Generator().manual_seed(3)
    return [{"input_ids": row, "labels": row} for row in torch.randint(3, 300, (8, 12), generator=draw)]


def arguments(folder, steps, **more):
    return transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, save_steps=2, lr_scheduler_type="constant",
        learning_rate=1e-2, report_to=[], logging_strategy="no", use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip


def test_two_adapters_with_turns_train_in_one_run_and_go_on_from_its_checkpoint(bases, tmp_path):
    ends = []
    for steps, resume in ((4, None), (2, None), (4, str(tmp_path / "2" / "checkpoint-2"))):
        one = adapted(bases, "DynaLoRA", name="one", seed=1)
        two = huggingface.attach(one.model, "dyna_lora", ["mlp_fc2"], name="two", rank=2, active=1, period=1)
        one.adapters.set_adapter({"one": 1, "two": 0.5})
        optimizer = torch.optim.AdamW(one.parameter_groups(1e-2) + two.parameter_groups(1e-2))
        args = arguments(tmp_path / str(steps), steps, restore_callback_states_from_checkpoint=bool(resume))
        trainer = transformers.Trainer(
            one.model, args, train_dataset=rows(), optimizers=(optimizer, None),
            callbacks=[one.callback(), two.callback()],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        ends.append([(one.variant.state_dict(), one.named_tensors()), (two.variant.state_dict(), two.named_tensors())])
    assert ends[0][0][0] != ends[0][1][0]
    for (knows, tensors), (known, again) in zip(ends[0], ends[2], strict=True):
        assert known == knows
        for key, tensor in tensors.items():
            assert torch.equal(again[key], tensor), key


def test_two_rates_without_the_optimizer_that_has_them_is_an_error_at_the_first_step(bases, tmp_path):
    for callback in (True, False):
        adapter = adapted(bases, "CondLoRA")
        callbacks = [adapter.callback()] if callback else []
        message = "theta_A is in none of its groups" if callback else "lr_ratio=4 takes part in every step"
        with pytest.raises(UsageError, match=message):
            transformers.Trainer(
                adapter.model, arguments(tmp_path, 2), train_dataset=rows(), callbacks=callbacks
            ).train()


KINDS = {
    "TL6": ("tied_lora", {"preset": "TL6"}),
    "VeRA": ("vera", {}),
    "CondLoRA": ("cond_lora", {}),
    "DoRA": ("tied_lora", {"preset": "LoRA", "dora": True}),
}


def gradients(bases, kind, autocast=False, **checkpointing):
    scheme, settings = KINDS[kind]
    model = twins.transformers_model(bases("llama")[0]).train()
    adapter = huggingface.attach(model, scheme, ["attention_qkv", "mlp_fc2"], rank=4, dropout=0.1, **settings)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.named_tensors().values():
            tensor += 0.03 * torch.randn(tensor.shape, generator=draw)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(twins.IDS, labels=twins.IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {key: tensor.grad for key, tensor in adapter.named_tensors().items() if tensor.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_and_autocast_give_the_same_gradients(kind, bases):
    loss, expected = gradients(bases, kind)
    for reentrant in (True, False):
        recomputed, found = gradients(bases, kind, use_reentrant=reentrant)
        torch.testing.assert_close(recomputed, loss)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient)
    for checkpointing in ({}, {"use_reentrant": False}):
        rounded, found = gradients(bases, kind, autocast=True, **checkpointing)
        assert rounded.item() == pytest.approx(loss.item(), rel=0.01)
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        whole, error = (torch.cat([part[key].flatten() for key in expected]) for part in (expected, found))
        assert (error - whole).norm() < 0.2 * whole.norm()  # the model's own rounding: bfloat16 has 8 bits
