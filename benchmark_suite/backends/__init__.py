"""Where cells are trained: backends by the name of their host, ``nemo`` and ``hf`` among them.

One of your own is a class that does what ``protocol.Backend`` says, added by ``register`` or by an installed package
that names it under ``benchmark_suite.backends``.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from benchmark_suite.backends.protocol import Backend
from nemo_tiedlora.facade import UsageError, closest

#: Installed packages name their backends under it, each by its host's name.
ENTRY_POINTS = "benchmark_suite.backends"
#: The base as a user has named it, and the precision → what trains on it, with nothing loaded yet.
Factory = Callable[[str | Path, str], Backend]


def _lazily(module: str, name: str) -> Factory:
    def make(base: str | Path, precision: str) -> Backend:
        return getattr(import_module(module), name)(base, precision)

    return make


BACKENDS: dict[str, Factory] = {
    "nemo": _lazily("benchmark_suite.backends.nemo", "NemoBackend"),
    "hf": _lazily("benchmark_suite.backends.hf.backend", "HfBackend"),
}


def register(host: str, factory: Factory) -> None:
    """Add a backend.

    Raises:
        UsageError: there is one for this host.
    """
    if host in BACKENDS:
        raise UsageError("host", host, "registered already; give it another name")
    BACKENDS[host] = factory


def backend(host: str, base: str | Path, precision: str = "32") -> Backend:
    """The backend of a host, on a base.

    Args:
        precision: ``32`` or ``bf16``.

    Raises:
        UsageError: no such host, with the closest name; or a base that it does not run.
    """
    if host not in BACKENDS:
        installed = {found.name: found for found in entry_points(group=ENTRY_POINTS)}
        if host not in installed:
            raise UsageError("host", host, closest(host, [*BACKENDS, *installed]))
        register(host, installed[host].load())
    return BACKENDS[host](base, precision)
