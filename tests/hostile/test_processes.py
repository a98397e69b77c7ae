"""Hostile bases and adapters through the commands as a user starts them: the script and the generator.

What each reader refuses is tried case by case in test_hostile_files.py, in one process; here, that nothing on the way
from the command line to it reads the file first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import files
import forked
import pytest
from checkpoint.conftest import _make
from files import CANARY

from nemo_tiedlora.checkpoint.store import write

ROOT = Path(__file__).parents[2]
SCRIPT, GENERATOR = (ROOT / "examples" / f"megatron_gpt_{name}.py" for name in ("finetuning", "generate"))
CALL = files.calls(CANARY)["os.system"]


def base_that_calls(path: Path) -> Path:
    return files.pack(path, files.single() | {"model_weights.ckpt": files.saved(files.weights() | {"x": CALL})})


def base_that_names_a_module(path: Path) -> Path:
    config = files.CONFIG | {"target": "this.s"}  # that module prints when it is imported
    return files.pack(path, files.single() | {"model_config.yaml": files.yaml(config)})


def pieces_that_call(path: Path) -> Path:
    content = files.distributed(path.parent / "pieces") | {"model_weights/common.pt": files.saved({"epoch": CALL})}
    return files.pack(path, content)


def adapter_that_calls(path: Path) -> Path:
    content = files.nemos_own() | {"model_weights.ckpt": files.saved(files.lora() | {"x": CALL})}
    return files.pack(path, content)


def adapter_of_ours_that_calls(path: Path) -> Path:
    content = files.nemos_own({"peft_scheme": "tied_lora", "tied_lora_tuning": {"rank": 2}})
    return files.pack(path, content | {"model_weights.ckpt": files.saved({"x": CALL})})


def adapter_with_a_flipped_bit(path: Path) -> Path:
    write(replace(_make(shape=files.SHAPE), model_config=None), path)
    content = bytearray(path.read_bytes())
    content[300] ^= 1  # of the tar header of its config
    path.write_bytes(content)
    return path


def start(door: Path, folder: Path, base: Path, adapter: Path | None, scheme: str) -> tuple[int, str, str]:
    """The script or the generator, with that base and adapter, in ``folder``."""
    if door == GENERATOR:
        more = ["--adapter", adapter] if adapter else []
        return forked.script(door, "--base", base, *more, "two plus two", cwd=folder)
    more = [f"model.peft.restore_from_path={adapter}"] if adapter else []
    own = [f"model.restore_from_path={base}", f"model.peft.peft_scheme={scheme}", f"exp_manager.exp_dir={folder}/runs"]
    return forked.script(door, *own, *more, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("door", [SCRIPT, GENERATOR], ids=["script", "generator"])
@pytest.mark.parametrize(
    ("make", "scheme"),
    [
        (base_that_calls, None),
        (base_that_names_a_module, None),
        (pieces_that_call, None),
        (adapter_that_calls, "lora"),
        (adapter_of_ours_that_calls, "tied_lora"),
        (adapter_with_a_flipped_bit, "tied_lora"),
    ],
)
def test_a_hostile_file_is_one_line_and_runs_nothing(make, scheme, door, tmp_path):
    bad = make(tmp_path / "bad.nemo")
    sound = files.pack(tmp_path / "sound.nemo", files.single())
    base, adapter = (sound, bad) if scheme else (bad, None)
    code, out, err = start(door, tmp_path, base, adapter, scheme or "tied_lora")
    assert code == 2 and err.count("\n") == 1 and str(bad) in err, err[-2000:]
    assert not CANARY.exists() and "Zen" not in out and not (tmp_path / "runs").exists()
