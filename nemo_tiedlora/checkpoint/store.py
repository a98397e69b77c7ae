"""The canonical adapter file: a folder, or the same files in a ``.nemo``.

``adapter_model.safetensors`` holds the trained tensors, ``adapter_config.json`` all the rest and the SHA-256 of
everything. Equal adapters give equal bytes. Beside the tensors a folder holds less than 5 KB.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from nemo_tiedlora.checkpoint.adapter import Adapter, Base, Blueprint
from nemo_tiedlora.checkpoint.stack import stack, unstack
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import move, replacing, write_bytes
from nemo_tiedlora.model.archive import entry, opened
from nemo_tiedlora.model.config import MODEL_CONFIG, check, parse
from nemo_tiedlora.model.data import dump

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FORMAT = 1
#: A config, or the names in a tensor file, cannot be larger.
MOST_BYTES = 4 * 2**20
#: A number cannot be larger.
MOST_ITEM_BYTES = 8


def write(adapter: Adapter, path: str | Path) -> str:
    """Write ``adapter`` to a folder, or to a file if ``path`` ends in ``.nemo``; what is there before stays until then.

    Returns:
        The adapter's SHA-256, which its ``adapter_config.json`` records.

    Raises:
        UsageError: the disk is full.
    """
    path = Path(path)
    payload = save_tensors({key: tensor.contiguous() for key, tensor in stack(adapter.tensors).items()})
    if path.suffix != ".nemo":
        config = _config(adapter, payload, None)
        _write_folder(path, config, payload)
        return json.loads(config)["sha256"]
    model_config = (adapter.model_config or _minimal_model_config(adapter)).encode()
    config = _config(adapter, payload, model_config)
    with replacing(path) as unfinished, tarfile.open(unfinished, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in ((MODEL_CONFIG, model_config), (CONFIG, config), (TENSORS, payload)):
            tar.addfile(entry(name, len(content)), io.BytesIO(content))
    return json.loads(config)["sha256"]


def is_canonical(path: str | Path, field: str = "adapter") -> bool:
    """Whether the adapter at ``path`` is in this form; a ``.nemo`` can also be in NeMo's.

    Raises:
        UsageError: no such file, or one that is damaged, so that nothing can be said of it.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return True
    with opened(path, field) as archive:
        return CONFIG in archive.members or TENSORS in archive.members


def read(path: str | Path, field: str = "adapter") -> Adapter:
    """The adapter at ``path``: its folder, the tensor file in that folder, or a ``.nemo``.

    Everything is checked before anything is returned; nothing is unpickled or unpacked.

    Args:
        field: what messages call the path.

    Raises:
        UsageError: not such a file, one that was changed or cut off, one whose tensors do not fit its settings, or one
            with NaN or infinity in it.
    """
    return read_with_sha256(path, field)[0]


def read_with_sha256(path: str | Path, field: str = "adapter") -> tuple[Adapter, str]:
    """The adapter at ``path``, as ``read``, and the SHA-256 that identifies it."""
    path = Path(path)
    if path.suffix == ".safetensors":
        path = path.parent
    with _blaming(path, field):
        if path.is_dir():
            config = _parse(_read_file(path / CONFIG, MOST_BYTES))
            payload = _read_payload(path, config)
            model_config = None
        else:
            with opened(path, field) as archive:
                if CONFIG not in archive.members:
                    way_out = "tiedlora convert makes an adapter of a LoRA in NeMo's own form"
                    raise archive.error(f"there is no {CONFIG} in it; {way_out}")
                config = _parse(archive.read(CONFIG, MOST_BYTES))
                payload = archive.read(TENSORS, _most_bytes(config))
                model_config = archive.read(MODEL_CONFIG, MOST_BYTES)
        _check_digest(config, "payload_sha256", payload, TENSORS)
        if model_config is not None:
            _check_digest(config, "model_config_sha256", model_config, MODEL_CONFIG)
            check(parse(model_config))
        adapter = Adapter(
            scheme=config["method"],
            settings=config["settings"],
            base=Base(**config["base"]),
            tensors=unstack(load_tensors(payload)),
            versions=config["versions"],
            model_config=None if model_config is None else model_config.decode(),
        )
        for key, tensor in adapter.tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"the tensor {key} has NaN or infinity in it")
        return adapter, config["sha256"]


def _config(adapter: Adapter, payload: bytes, model_config: bytes | None) -> bytes:
    content: dict[str, Any] = {
        "format": FORMAT,
        "method": adapter.scheme,
        "settings": adapter.settings,
        "base": asdict(adapter.base),
        "versions": adapter.versions,
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
    }
    if adapter.version != 1:
        content["method_version"] = adapter.version
    if model_config is not None:
        content["model_config_sha256"] = hashlib.sha256(model_config).hexdigest()
    return _dump(content | {"sha256": _sha256(content)})


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _sha256(content: dict[str, Any]) -> str:
    """Identifies an adapter: of all its config but this, and so of its tensors; not of how it is packed."""
    own = {name: value for name, value in content.items() if name not in ("sha256", "model_config_sha256")}
    return hashlib.sha256(_dump(own)).hexdigest()


def _parse(text: bytes) -> dict[str, Any]:
    """The config, once it is known to be as it was written.

    Raises:
        ValueError: it is not.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{CONFIG} is cut off or damaged: it is not JSON") from None
    if not isinstance(config, dict) or "format" not in config:
        raise ValueError(f"{CONFIG} is of another program")
    if config["format"] != FORMAT:
        raise ValueError(f"its format is {config['format']!r}; this version reads {FORMAT}")
    if _dump(config) != text or config.get("sha256") != _sha256(config):
        raise ValueError(f"{CONFIG} is not as it was written: its SHA-256 differs")
    return config


def _check_digest(config: dict[str, Any], name: str, content: bytes, file: str) -> None:
    if config[name] != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{file} is not the one that was written: its SHA-256 differs")


def _most_bytes(config: dict[str, Any]) -> int:
    """Of the tensor file, if it fits its config."""
    blueprint = Blueprint(config["method"], config["settings"], Base(**config["base"]))
    version = config.get("method_version", 1)
    if version != blueprint.version:
        raise ValueError(f"it is of version {version!r} of {blueprint.scheme}; here it is {blueprint.version}")
    return MOST_ITEM_BYTES * sum(map(prod, blueprint.shapes.values())) + MOST_BYTES


def _pending(folder: Path, sha256: str) -> Path:
    return folder / f".{TENSORS}.{sha256[:16]}"


def _write_folder(folder: Path, config: bytes, payload: bytes) -> None:
    """Both files change at one moment, that of the config: until it names the new tensors, the old ones are there, and
    until the new ones have their name, readers find them by their checksum."""
    pending = _pending(folder, hashlib.sha256(payload).hexdigest())
    try:
        write_bytes(pending, payload)
        write_bytes(folder / CONFIG, config)
    except BaseException:
        if pending.exists() and not _committed(folder, pending):
            pending.unlink()
        raise
    move(pending, folder / TENSORS)
    for leftover in folder.glob(f".{TENSORS}.*"):
        leftover.unlink(missing_ok=True)


def _committed(folder: Path, pending: Path) -> bool:
    try:
        return _pending(folder, _parse((folder / CONFIG).read_bytes())["payload_sha256"]) == pending
    except (OSError, ValueError, KeyError):
        return False


def _read_payload(folder: Path, config: dict[str, Any]) -> bytes:
    most, sha256 = _most_bytes(config), config["payload_sha256"]
    payload = _read_file(folder / TENSORS, most) if (folder / TENSORS).exists() else b""
    if hashlib.sha256(payload).hexdigest() != sha256 and _pending(folder, sha256).exists():
        return _read_file(_pending(folder, sha256), most)  # its writer was killed just before the last step
    return payload or _read_file(folder / TENSORS, most)


def _read_file(path: Path, most: int) -> bytes:
    if not path.is_file():
        raise ValueError(f"there is no {path.name} in it")
    size = os.stat(path).st_size
    if size > most:
        raise ValueError(f"{path.name} is larger than it can be: {size:,} bytes instead of at most {most:,}")
    return path.read_bytes()


@contextmanager
def _blaming(path: Path, field: str) -> Iterator[None]:
    """Say of any error what file it is in: whatever a stranger's file makes fail is that file's fault."""
    try:
        yield
    except UsageError as error:
        if error.value == str(path):
            raise
        raise UsageError(field, str(path), f"{error.field}={error.value!r}: {error.way_out}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(field, str(path), f"{CONFIG} is damaged ({type(error).__name__}: {error})") from None
    except (ValueError, SafetensorError, OverflowError, OSError) as error:
        raise UsageError(field, str(path), f"not a readable adapter: {error}") from None


def _minimal_model_config(adapter: Adapter) -> str:
    """What NeMo needs to know which adapter it is, where there is no training model's config."""
    return dump({"mcore_gpt": True, **adapter.base.shape, "peft": adapter.peft})
