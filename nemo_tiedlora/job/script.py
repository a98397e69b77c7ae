"""What every Hydra script here shares: our resolvers, and ends that are said in one line, with their exit codes."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_tiedlora import scripts
from nemo_tiedlora.errors import RunError, UsageError, closest
from nemo_tiedlora.extras import lacking
from nemo_tiedlora.own_methods import take
from nemo_tiedlora.platform.threads import wait_passively
from nemo_tiedlora.ranks import is_first_rank

if TYPE_CHECKING:  # importing it takes long enough for a signal to come
    from omegaconf import DictConfig

#: Seconds that a signal gives a script to end by itself.
PATIENCE = 10
#: What gloo, NCCL and the rendezvous say on a rank that another one has left.
RANK_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|failed to recv|recvValue failed"
)


def prepare_hydra() -> None:
    """What our configs need of Hydra: resolvers, and a section for every method.

    ``${demo:x,y}``: x for the built-in task, y for own data. ``${best:metric}``: whether less or more is better.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    def demo(builtin, own, *, _root_):
        return builtin if _root_.model.data.train_ds.file_names is None else own

    OmegaConf.register_new_resolver("demo", demo, replace=True)
    OmegaConf.register_new_resolver("best", lambda metric: "min" if metric in ("loss", "wer") else "max", replace=True)
    ConfigStore.instance().store("methods", sections(), package="model.peft")


def sections() -> dict[str, dict[str, Any]]:
    """The section of every method under ``model.peft``, with its defaults."""
    from nemo_tiedlora.variants import METHODS

    recorded = {"checksums"}  # by training, in adapter files
    return {
        f"{scheme}_tuning": {
            name: "${model.seed}" if name == "seed" else value
            for name, value in METHODS[scheme].settings().items()
            if name not in recorded
        }
        for scheme in METHODS
    }


def hydra_script(config_path: Path, config_name: str) -> Callable[[Callable[["DictConfig"], None]], Callable[[], None]]:
    """Make a function of the composed config into a script's ``main``.

    ``--help`` lists the most used settings. Ends that need no traceback are one line on standard error: a mistake in
    the input has exit code 2; a run that cannot go on, or that another rank has left, 1; one that a signal stopped
    128 + signal, as shells expect. Anything else is a defect and keeps its traceback.
    """

    def decorate(job: Callable[["DictConfig"], None]) -> Callable[[], None]:
        def main() -> None:
            with _stopping_at_signals():
                given = sys.argv[1:]
                try:
                    sys.argv[1:] = take(given)
                except UsageError as error:
                    _exit(str(error))
                if {"--help", "-h"} & set(sys.argv[1:]):
                    from nemo_tiedlora.job.script_help import help_text

                    purpose = sys.modules[job.__module__].__doc__.splitlines()[0]
                    command = scripts.command() or f"python {sys.argv[0]}"
                    print(help_text(purpose, command, config_path.resolve() / f"{config_name}.yaml"))
                    return
                try:
                    _run(job, config_path, config_name, given)
                except ModuleNotFoundError as error:
                    if not (known := lacking(error)):
                        raise
                    _exit(str(known))

        return main

    return decorate


def _run(job: Callable[["DictConfig"], None], config_path: Path, config_name: str, given: list[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    wait_passively()
    prepare_hydra()
    # Hydra prints its own errors over several lines and exits with 1 unless told to raise them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    composed: list[tuple[DictConfig, bool]] = []
    take = hydra.main(version_base="1.3", config_path=str(config_path.resolve()), config_name=config_name)
    try:
        # The job runs outside Hydra, which would print its own report before any error of the job.
        take(lambda cfg: composed.append((cfg, HydraConfig.get().mode == RunMode.MULTIRUN)))()
        sys.argv[1:] = given  # with it, Lightning starts the processes of other devices
        for cfg, sweep in composed:
            from nemo_tiedlora.checkpoint.pickles import trusting

            with trusting(_trusted(cfg, sweep)):
                job(cfg)
    except UsageError as error:
        _exit(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _exit(_explain(error, config_path, config_name))
    except RunError as error:
        _exit(str(error), 1) if is_first_rank() else sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _exit(f"no disk space left while writing {error.filename or 'the output folder'}")
    except RuntimeError as error:
        if not RANK_LOST.search(str(error)):
            raise
        _exit("another rank of this job ended; the same command continues from the last checkpoint", 1)


def _trusted(cfg: "DictConfig", sweep: bool) -> list[str]:
    """The files that the user trusts, by SHA-256; they are taken out of ``cfg``.

    Raises:
        UsageError: they are not on the command line itself, so that somebody else may have set them.
    """
    given = cfg.get("trust_sha256")
    if given is None:
        return []
    from nemo_tiedlora.checkpoint.pickles import check_digests

    digests = check_digests(given, "trust_sha256")
    said = " ".join(argument for argument in sys.argv[1:] if argument.lstrip("+").startswith("trust_sha256="))
    for digest in digests:
        if sweep or digest not in said.lower():
            raise UsageError("trust_sha256", digest, "is taken from the command line of a single run only")
    cfg.trust_sha256 = None
    return digests


def _explain(error: Exception, config_path: Path, config_name: str) -> str:
    """Hydra's message in one line, with the closest name where a setting is mistyped."""
    from omegaconf import DictConfig, OmegaConf

    mistyped = re.search(r"Could not override '([\w.]+)'", str(error))
    if not mistyped:
        return " ".join(str(error).split())
    written = OmegaConf.load(config_path / f"{config_name}.yaml")
    section = OmegaConf.merge({"model": {"peft": sections()}}, written) if "model" in written else written
    for name in mistyped[1].split("."):
        if not isinstance(section, DictConfig):
            return f"{mistyped[1]}: {name!r} is below a setting that has no parts"
        if name not in section:
            return f"{mistyped[1]}: there is no {name!r}; {closest(name, section)}"
        section = section._get_node(name)
    return " ".join(str(error).split())


@contextmanager
def _stopping_at_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the block in one line, whatever it was doing; a second one ends the process.

    Training has handlers of its own meanwhile. A signal that is ignored (nohup, a job in the background) stays so.
    """
    told, own = [], os.getpid()

    def stop(signum, frame):
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        if os.getpid() != own:  # a worker, forked from it
            os.kill(os.getpid(), signum)
            return
        told.append(signal.Signals(signum))
        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        raise KeyboardInterrupt

    def give_up(signum, frame):  # something has swallowed the interrupt; imports do
        say()
        sys.stderr.flush()
        os._exit(128 + told[0])

    def say():
        if is_first_rank():
            line = f"stopped by {told[0].name}; the same command begins again, or continues from the last checkpoint"
            print(line, file=sys.stderr)

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {each: signal.getsignal(each) for each in handled if signal.getsignal(each) != signal.SIG_IGN}
    for each in previous:
        signal.signal(each, stop)
    try:
        yield
    except BaseException:  # whatever became of the interrupt on its way: Lightning, for one, exits with 1
        if not told:
            raise
        say()
        sys.exit(128 + told[0])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in previous.items():
            signal.signal(each, handler)


def _exit(line: str, code: int = 2) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
