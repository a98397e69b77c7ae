"""What stands in for `make` in the folder of NeMo's C++ dataset helper."""

from __future__ import annotations

import importlib
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from nemo_tiedlora.platform.patch import Restore, patch


def build(source: Path) -> Path:
    """Compile a pybind11 source next to itself, for the running interpreter; return the extension's path.

    The compiler writes to a file of its own, which then replaces the result in one step: processes that compile at
    the same time do not see each other's half-written files.
    """
    import pybind11

    target = source.with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
        return target
    if not os.access(source.parent, os.W_OK):
        raise RuntimeError(
            f"NeMo's dataset helper has to be compiled once, into {source.parent}, which is not writable: "
            "run once as a user who may write there"
        )
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-O3", "-Wall", "-shared", "-std=c++17", "-fPIC"]
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        compiled = Path(folder) / target.name
        command = [os.environ.get("CXX", "g++"), *flags, *includes, str(source), "-o", str(compiled)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError(f"NeMo's dataset helper needs a C++ compiler; {command[0]} was not found") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"NeMo's dataset helper did not compile:\n{error.stderr}") from error
        compiled.replace(target)
    return target


@patch(needed=lambda: True)
def dataset_helper_build(restore: Restore) -> None:
    """NeMo compiles its dataset helper with `make`, which asks whichever python3 comes first on PATH for pybind11.

    In a virtual environment that is not activated that is the wrong one. Here the running interpreter is asked.
    """
    from nemo.collections.nlp.data.language_modeling.megatron import dataset_utils

    def compile_helper() -> None:
        build(Path(dataset_utils.__file__).with_name("helpers.cpp"))
        # Python remembers a folder's files; a new one can have the time stamp of what it remembers.
        importlib.invalidate_caches()

    restore.set(dataset_utils, "compile_helper", compile_helper)
