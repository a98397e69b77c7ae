"""What every Hydra script here shares: our resolvers, and errors as one line with exit code 2."""

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.nemo.script_help import help_text
from nemo_tiedlora.platform.threads import wait_passively


def register_resolvers() -> None:
    """``${demo:x,y}``: x for the built-in task, y for own data. ``${best:metric}``: whether less or more is better."""

    def demo(builtin, own, *, _root_):
        return builtin if _root_.model.data.train_ds.file_names is None else own

    OmegaConf.register_new_resolver("demo", demo, replace=True)
    OmegaConf.register_new_resolver("best", lambda metric: "min" if metric in ("loss", "wer") else "max", replace=True)


def hydra_script(config_path: Path, config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a function of the composed config into a script's ``main``.

    ``--help`` lists the most used settings. A mistake in the input ends in one line on standard error and exit code 2,
    an interrupted run in exit code 128 + signal as shells expect; anything else is a defect and keeps its traceback.
    """

    def decorate(job: Callable[[DictConfig], None]) -> Callable[[], None]:
        def main() -> None:
            if {"--help", "-h"} & set(sys.argv[1:]):
                config = config_path.resolve() / f"{config_name}.yaml"
                print(help_text(sys.modules[job.__module__].__doc__.splitlines()[0], sys.argv[0], config))
                return
            wait_passively()
            register_resolvers()
            # Hydra prints its own errors over several lines and exits with 1 unless told to raise them.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            composed: list[DictConfig] = []
            take = hydra.main(version_base="1.3", config_path=str(config_path.resolve()), config_name=config_name)
            try:
                # The job runs outside Hydra, which would print its own report before any error of the job.
                take(composed.append)()
                for cfg in composed:
                    job(cfg)
            except UsageError as error:
                _exit(str(error))
            except (HydraException, OmegaConfBaseException) as error:
                _exit(_explain(error, config_path, config_name))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                _exit(f"no disk space left while writing {error.filename or 'the output folder'}")

        return main

    return decorate


def _explain(error: Exception, config_path: Path, config_name: str) -> str:
    """Hydra's message in one line, with the closest name where a setting is mistyped."""
    mistyped = re.search(r"Could not override '([\w.]+)'", str(error))
    if not mistyped:
        return " ".join(str(error).split())
    section = OmegaConf.load(config_path / f"{config_name}.yaml")
    for name in mistyped[1].split("."):
        if not isinstance(section, DictConfig):
            return f"{mistyped[1]}: {name!r} is below a setting that has no parts"
        if name not in section:
            return f"{mistyped[1]}: there is no {name!r}; {closest(name, section)}"
        section = section._get_node(name)
    return " ".join(str(error).split())


def _exit(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
