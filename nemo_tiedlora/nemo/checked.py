"""What is in a training checkpoint, compared with the model that is to go on from it, before any of it is taken."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from nemo_tiedlora.errors import UsageError

NUMBERS = (int, float)
#: Longer reasons are cut: a checkpoint decides what is in them.
LONGEST = 300
#: The learning rates of all groups are alike; another layout may have another number of groups.
RATES = ("base_lrs", "_last_lr")


class Checked:
    """A training checkpoint that was read from ``path``.

    All methods raise ``UsageError`` for the first thing that does not fit, by its name.
    """

    def __init__(self, path: str | Path, content: Any):
        self.path, self.content = path, content
        if not isinstance(content, dict):
            raise self.error("it holds no training state")

    def error(self, reason: str) -> UsageError:
        """What is wrong with it."""
        reason = "".join(letter if letter.isprintable() else " " for letter in reason)
        reason = reason if len(reason) <= LONGEST else f"{reason[:LONGEST]}…"
        way_out = f"{reason}; put another checkpoint in its place, or remove it to start again"
        return UsageError("checkpoint", str(self.path), way_out)

    def progress(self, trainer) -> None:
        """Counters of steps and schedules have the form that this run's have; files to replace are its own."""
        for name in ("global_step", "epoch"):
            if type(self.content.get(name)) is not int or self.content[name] < 0:
                raise self.error(f"{name} is {self.content.get(name)!r}")
        version = self.content.get("pytorch-lightning_version")
        try:
            Version(version)
        except (InvalidVersion, TypeError):
            raise self.error(f"pytorch-lightning_version is {version!r}") from None
        self.alike(self.content.get("loops"), {"fit_loop": trainer.fit_loop.state_dict()}, "loops")
        schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        saved = self.content.get("lr_schedulers")
        if not isinstance(saved, list) or len(saved) != len(schedulers):
            raise self.error(f"lr_schedulers must be a list of {len(schedulers)}")
        for one, mine in zip(saved, schedulers, strict=True):
            self.alike(one, mine, "lr_schedulers")
        callbacks = self.content.get("callbacks")
        if not isinstance(callbacks, dict) or not all(isinstance(state, dict) for state in callbacks.values()):
            raise self.error("callbacks must hold the state of each by name")
        for callback in trainer.callbacks:
            if callback.state_key in callbacks:
                self._state_of(callback.state_key, callbacks[callback.state_key], callback.state_dict())
        for name, state in callbacks.items():
            if "best_k_models" in state:
                self._own_files(name, state)
        self._random_states(self.content.get("random_states"))

    def _state_of(self, name: str, saved: dict[str, Any], mine: dict[str, Any]) -> None:
        """A callback finds what it looks for; what it kept may have grown since it began."""
        for key, value in mine.items():
            if key not in saved:
                raise self.error(f"callbacks.{name}.{key} is missing")
            if isinstance(value, list | dict) and type(saved[key]) is not type(value):
                raise self.error(f"callbacks.{name}.{key} is {type(saved[key]).__name__}")

    def _own_files(self, name: str, state: dict[str, Any]) -> None:
        """A checkpoint names others that are removed when a better one comes: only those beside it may be."""
        best = state["best_k_models"]
        files = [*best, *(state.get(f"{kind}_path") for kind in ("best_model", "kth_best_model", "last_model"))]
        folder = state.get("dirpath")
        for file in filter(None, files):
            if not isinstance(best, dict) or not isinstance(file, str) or str(Path(file).parent) != str(folder):
                raise self.error(f"{name} names {file!r}, which is not beside it")
        for file, score in best.items():
            if not isinstance(score, NUMBERS) and not (self._is_plain(score) and not score.dim()):
                raise self.error(f"{name}.best_k_models.{file} is {type(score).__name__}, not a number")

    def alike(self, saved: Any, mine: Any, name: str) -> None:
        """Nested settings have the names and kinds of this run's own."""
        if isinstance(mine, Mapping):
            if not isinstance(saved, Mapping):
                raise self.error(f"{name} is {saved!r}")
            for key in mine:
                if key not in saved:
                    raise self.error(f"{name}.{key} is missing")
                self.alike(saved[key], mine[key], f"{name}.{key}")
        elif isinstance(mine, list | tuple):
            if not isinstance(saved, list | tuple) or not all(self._is_number(one) for one in saved):
                raise self.error(f"{name} is {saved!r}")
            if len(saved) != len(mine) and not (saved and name.rsplit(".", 1)[-1] in RATES):
                raise self.error(f"{name} is {saved!r}")
        elif isinstance(mine, NUMBERS) and not (self._is_number(saved) or (type(saved) is float and saved == mine)):
            raise self.error(f"{name} is {saved!r}")

    @staticmethod
    def _is_number(value: Any) -> bool:
        return isinstance(value, NUMBERS) and abs(value) < float("inf")

    @staticmethod
    def _is_plain(value: Any) -> bool:
        """Whether all numbers of a tensor are there."""
        return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta

    def _random_states(self, states: Any) -> None:
        if not isinstance(states, list | None):
            raise self.error(f"random_states is damaged ({type(states).__name__})")
        mine = torch.cuda.get_rng_state()
        for state in states or ():
            try:
                random.Random().setstate(state["python"])
                numpy.random.RandomState().set_state(state["numpy"])
                torch.Generator().set_state(state["torch"])
                for device in (state["cuda"], *state["megatron"].values()):  # of another form than a CPU's
                    if device.dtype != torch.uint8 or device.shape != mine.shape:
                        raise ValueError
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
                raise self.error(f"random_states is damaged ({type(error).__name__})") from None

    def whole(
        self, name: str, saved: Any, shapes: dict[str, tuple[int, ...]], settings: list[dict], dtypes: set[torch.dtype]
    ) -> None:
        """What an optimizer keeps of one scheme's tensors, whole: ``tensor``, ``settings``, moments and counters.

        Args:
            shapes: of every trained tensor, by key.
            settings: those of this run's groups.
            dtypes: those of the tensors that this run's optimizer trains on this rank, if any.
        """
        self.names(name, saved, shapes)
        kinds = {kind for state in saved.values() if isinstance(state, dict) for kind in state}
        for key, state in saved.items():
            if not isinstance(state, dict) or not {"tensor", "settings"} <= state.keys():
                raise self.error(f"{name}.{key} holds no tensor and its settings")
            if state.keys() not in ({"tensor", "settings"}, kinds):
                raise self.error(f"{name}.{key}.{sorted(kinds - state.keys())[0]} is missing")
            for kind, value in state.items():
                if kind == "settings":
                    self.settings(f"{name}.{key}.{kind}", value, settings[0])
                elif kind == "tensor":
                    self.tensor(f"{name}.{key}.{kind}", value, shapes[key], dtypes)
                elif isinstance(value, Tensor) and value.dim():
                    self.tensor(f"{name}.{key}.{kind}", value, shapes[key], dtypes and {*dtypes, torch.float32})
                else:
                    self.counter(f"{name}.{key}.{kind}", value)

    def settings(self, name: str, saved: Any, mine: dict[str, Any]) -> None:
        """What a group of the optimizer says beside its tensors, which it must not name."""
        self.alike(saved, mine, name)
        for key in ("params", "keys", "adapter"):
            if key in saved and (key not in mine or saved[key] != mine[key]):
                raise self.error(f"{name}.{key} is not this run's")

    def names(self, name: str, saved: Any, mine: Mapping[str, Any]) -> None:
        """A section has the names that this run's has, and no others."""
        if not isinstance(saved, Mapping):
            raise self.error(f"{name} is {type(saved).__name__}")
        for key in mine:
            if key not in saved:
                raise self.error(f"{name}.{key} is missing")
        for key in saved:
            if key not in mine:
                raise self.error(f"{name}.{key} is not one of this run's")

    def tensor(self, name: str, value: Any, shape: tuple[int, ...], dtypes: set[torch.dtype] = frozenset()) -> None:
        """A tensor of numbers, all finite, of this shape and, where some are given, of one of these types."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise self.error(f"{name} is {kind}, not a tensor of numbers")
        if not self._is_plain(value):
            raise self.error(f"{name} is sparse or without its numbers")
        if dtypes and value.dtype not in dtypes:
            raise self.error(f"{name} is {value.dtype} instead of {' or '.join(sorted(map(str, dtypes)))}")
        if tuple(value.shape) != tuple(shape):
            raise self.error(f"{name} has shape {tuple(value.shape)} instead of {tuple(shape)}")
        if not value.isfinite().all():
            raise self.error(f"{name} has NaN or infinity in it")

    def counter(self, name: str, value: Any) -> None:
        """A finite number, or a tensor of one."""
        number = value.item() if self._is_plain(value) and not value.dim() else value
        if not self._is_number(number):
            raise self.error(f"{name} is {type(value).__name__}, not a number")

    def state_dict(self, model: Mapping[str, Any]) -> None:
        """Every tensor of a stock model, by this model's ``state_dict()``."""
        saved = self.content.get("state_dict")
        if not isinstance(saved, Mapping) or not all(isinstance(key, str) for key in saved):
            raise self.error("state_dict must hold tensors by name")
        saved, model = ({key.replace("module.", ""): value for key, value in one.items()} for one in (saved, model))
        self.names("state_dict", saved, model)
        for key, mine in model.items():
            if isinstance(mine, Tensor) and mine.is_floating_point():
                self.tensor(f"state_dict.{key}", saved[key], mine.shape, {mine.dtype})

    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The state of a stock optimizer, perhaps with NeMo's wrapper around it: they take tensors of any shape."""
        saved = self.content.get("optimizer_states")
        if not isinstance(saved, list) or len(saved) != 1 or not isinstance(saved[0], dict):
            raise self.error("optimizer_states must be a list of one")
        self._copies(saved[0], getattr(optimizer, "fp32_from_float16_groups", None))
        optimizer = getattr(optimizer, "optimizer", optimizer)
        saved = saved[0].get("optimizer", saved[0])
        groups, states = saved.get("param_groups"), saved.get("state")
        if not isinstance(groups, list) or not isinstance(states, dict) or len(groups) != len(optimizer.param_groups):
            raise self.error(f"optimizer_states must have {len(optimizer.param_groups)} param_groups and their state")
        for number, (group, mine) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
            name = f"optimizer_states.param_groups.{number}"
            wanted = {key: value for key, value in mine.items() if key != "params"}
            self.alike(group, wanted, name)
            if not isinstance(group.get("params"), list) or len(group["params"]) != len(mine["params"]):
                raise self.error(f"{name}.params must be {len(mine['params'])} numbers")
            for place, tensor in zip(group["params"], mine["params"], strict=True):
                for kind, value in (states.get(place) or {}).items():
                    if isinstance(value, Tensor) and value.dim():
                        self.tensor(f"optimizer_states.state.{place}.{kind}", value, tensor.shape)
                    else:
                        self.counter(f"optimizer_states.state.{place}.{kind}", value)

    def _copies(self, saved: dict[str, Any], mine: list[list[Tensor]] | None) -> None:
        """The float32 copies that NeMo's wrapper keeps, by group."""
        if mine is None:
            return
        name = "optimizer_states.fp32_from_fp16_params"
        groups = saved.get("fp32_from_fp16_params", saved.get("fp32_from_fp16"))
        if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
            raise self.error(f"{name} must hold lists of tensors")
        if [len(group) for group in groups] != [len(group) for group in mine]:
            raise self.error(f"{name} must hold {[len(group) for group in mine]} tensors")
        for number, (group, own) in enumerate(zip(groups, mine, strict=True)):
            for place, (value, tensor) in enumerate(zip(group, own, strict=True)):
                self.tensor(f"{name}.{number}.{place}", value, tensor.shape, {tensor.dtype})

    def finite(self, content: Any, name: str) -> None:
        """No tensor in what was loaded piece by piece has NaN or infinity in it."""
        items = content.items() if isinstance(content, Mapping) else enumerate(content or ())
        for key, value in items if isinstance(content, Mapping | list | tuple) else ():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise self.error(f"{name}.{key} has NaN or infinity in it")
            self.finite(value, f"{name}.{key}") if isinstance(value, Mapping | list | tuple) else None
