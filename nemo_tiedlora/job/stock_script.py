"""Scripts that know nothing of this package, NVIDIA's own among them, run as they are with our schemes in NeMo.

What is added is what they cannot bring themselves: the host where this machine has no GPU, Apex or Transformer Engine,
the schemes, their sections in the script's config, and mistakes said in one line before anything is loaded.
"""

import atexit
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_tiedlora.checkpoint import is_canonical
from nemo_tiedlora.errors import UsageError, check_choice, closest
from nemo_tiedlora.huggingface.export import export
from nemo_tiedlora.job.inputs import under
from nemo_tiedlora.job.script import sections
from nemo_tiedlora.job.settings import ACCELERATORS, NO_GPU, check_gpus
from nemo_tiedlora.model.config import nemo_config
from nemo_tiedlora.own_methods import LOADED, OPTION
from nemo_tiedlora.platform.patch import Patch, Restore, patch
from nemo_tiedlora.variants import METHODS, OF_YOUR_OWN, config_for


def run(script: Path, arguments: list[str]) -> None:
    """Run a Python script as ``python SCRIPT ARGUMENTS`` would, until the process ends: nothing is taken back.

    Raises:
        UsageError: no Python script; or a mistake that the script made outside of Hydra.
        SystemExit: the script's own; 2 for a mistake in its config, said in one line; 1 for any other of its errors,
            whose traceback begins in the script.
    """
    if not script.is_file():
        raise UsageError("script", str(script), "no such file")
    if script.suffix != ".py":
        raise UsageError("script", str(script), "not a Python file (.py)")
    path = str(script.resolve())
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    try:
        _prepare()
        run_path(path, run_name="__main__")
    except UsageError:
        raise
    except Exception as error:
        inside = error.__traceback__
        while inside and inside.tb_frame.f_code.co_filename != path:
            inside = inside.tb_next
        if not inside and not isinstance(error, SyntaxError):
            raise
        traceback.print_exception(error.with_traceback(inside))
        sys.exit(1)


def _prepare() -> None:
    from nemo_tiedlora import platform, register

    platform.enter()
    register()
    restore = Restore()
    for one in PATCHES:
        if one.needed():
            one.apply(restore)


@patch(needed=lambda: True)
def processes_of_other_devices(restore: Restore) -> None:
    """Lightning starts further processes by the script's file, which alone would know none of our schemes."""
    from lightning.pytorch.strategies.launchers import subprocess_script

    def command(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = stock(*args, **kwargs)
        (python, *line), *folder = made if isinstance(made, tuple) else (made,)
        methods = [f"{OPTION}={path}" for path in LOADED]
        line = [python, "-m", "nemo_tiedlora", "run", *line, *methods]
        return (line, *folder) if folder else line

    for name in ("_basic_subprocess_cmd", "_hydra_subprocess_cmd"):
        restore.set(subprocess_script, name, partial(command, getattr(subprocess_script, name)))


@patch(needed=lambda: True)
def gpus_that_are_not_there(restore: Restore) -> None:
    """The host gives the CPU to whoever asks for a GPU; a user who runs somebody else's script is told instead."""
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    stock = _AcceleratorConnector._choose_gpu_accelerator_backend

    def choose():
        chosen = stock()
        if chosen == "cpu":
            raise UsageError("accelerator", "gpu", NO_GPU)
        return chosen

    restore.set(_AcceleratorConnector, "_choose_gpu_accelerator_backend", staticmethod(choose))


@patch(needed=lambda: True)
def sections_of_schemes(restore: Restore) -> None:
    """A script's config has no section for a scheme of ours, and Hydra refuses to set what a config has not."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    stock = ConfigLoaderImpl._apply_overrides_to_config

    def apply(overrides, cfg):
        with _said_in_one_line():
            peft = OmegaConf.select(cfg, "model.peft", throw_on_missing=False)
            if isinstance(peft, DictConfig):
                _complete(peft, seed="${model.seed}" if "seed" in cfg.model else None)
                for override in overrides:
                    if not (override.is_add() or override.is_delete()):
                        _check_name(override.key_or_group, override.value, peft)
        stock(overrides, cfg)
        with _said_in_one_line():
            check(cfg)
            _export_adapter(cfg)

    restore.set(ConfigLoaderImpl, "_apply_overrides_to_config", staticmethod(apply))


@patch(needed=lambda: True)
def mistakes_in_one_line(restore: Restore) -> None:
    """Hydra prints a traceback and what it was told for any error of its job, a mistake in the input too."""
    from hydra.core.utils import JobReturn

    stock = JobReturn.return_value

    def take(self, value):
        with _said_in_one_line():
            if isinstance(value, UsageError):
                raise value
        stock.fset(self, value)

    restore.set(JobReturn, "return_value", stock.setter(take))


#: Every change, in the order in which they are made.
PATCHES = tuple(value for value in list(globals().values()) if isinstance(value, Patch))


@contextmanager
def _said_in_one_line() -> Iterator[None]:
    """End in one line for a mistake in the input: Hydra would print a traceback, and what it was told besides."""
    try:
        yield
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _complete(peft: DictConfig, seed: str | None) -> None:
    """Put the defaults of every scheme below what a config says of it."""
    for name, defaults in sections().items():
        defaults["seed"] = seed or METHODS[name.removesuffix("_tuning")].settings()["seed"]
        with open_dict(peft):
            peft[name] = OmegaConf.merge(defaults, peft.get(name) or {})


def _check_name(name: str, value: Callable[[], Any], peft: DictConfig) -> None:
    """Refuse the name of a section or a setting below ``model.peft`` that is not there."""
    if not name.startswith("model.peft."):
        return
    section = peft
    for part in name.split(".")[2:4]:
        if not isinstance(section, DictConfig):
            return
        names = list(section.keys())  # those too that are still to be given: ???
        if part not in names:
            raise UsageError(name, value(), f"there is no {part!r}; {closest(part, names)}")
        section = section._get_node(part)


def check(cfg: DictConfig) -> None:
    """Check what a script's composed config says of this machine and of our schemes; resolve our sections in it, since
    NeMo takes them to where their interpolations lead nowhere.

    Raises:
        UsageError: for the first thing that is wrong.
    """
    trainer, peft = (OmegaConf.select(cfg, name, throw_on_missing=False) for name in ("trainer", "model.peft"))
    if isinstance(trainer, DictConfig):
        _check_machine(trainer)
    if isinstance(peft, DictConfig):
        for name in sections():
            OmegaConf.resolve(peft[name])
        for scheme in str(peft.get("peft_scheme") or "none").split(","):
            _check_scheme(scheme, peft)


def _export_adapter(cfg: DictConfig) -> None:
    """Give NVIDIA's merge script, which multiplies weights of NeMo's own LoRA, an adapter of ours as such a LoRA."""
    adapter, base = (
        OmegaConf.select(cfg, name, throw_on_missing=False) for name in ("lora_model_path", "gpt_model_file")
    )
    if not (adapter and base) or not is_canonical(adapter, "lora_model_path"):
        return
    ranks = cfg.get("tensor_model_parallel_size") or 1
    if ranks < 0:
        ranks = nemo_config(Path(base), "gpt_model_file").get("tensor_model_parallel_size", 1)
    if ranks > 1:
        way_out = "an adapter of ours is merged at 1 only, or by tiedlora merge, which needs no ranks"
        raise UsageError("tensor_model_parallel_size", ranks, way_out)
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    cfg.lora_model_path = f"{folder}/lora.nemo"
    export(Path(adapter), Path(base), "nemo-lora", Path(cfg.lora_model_path), "float32", None, False)


def _check_machine(trainer: DictConfig) -> None:
    if "accelerator" in trainer:
        check_choice("trainer.accelerator", trainer.accelerator, ACCELERATORS)
        if trainer.accelerator != "cpu":
            check_gpus(trainer)
    precision = str(trainer.get("precision"))
    if precision.startswith("transformer-engine") and not find_spec("transformer_engine"):
        raise UsageError("trainer.precision", precision, "needs Transformer Engine, which is not installed; use bf16")


def _check_scheme(scheme: str, peft: DictConfig) -> None:
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP

    if scheme not in PEFT_CONFIG_MAP:
        way_out = f"{closest(scheme, [name for name in PEFT_CONFIG_MAP if name])}; {OF_YOUR_OWN}"
        raise UsageError("model.peft.peft_scheme", scheme, way_out)
    if scheme in METHODS:
        with under(scheme):
            config_for(scheme, OmegaConf.to_container(peft[f"{scheme}_tuning"]))
