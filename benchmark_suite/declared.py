"""Declarations in YAML: read, checked field by field, and turned into dataclasses and back."""

from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from nemo_tiedlora.facade import UsageError, closest


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


Declared = TypeVar("Declared", bound=_Dataclass)


def read(file: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. YAML 1.2: ``no`` is a word and ``1e-4`` a number.

    Raises:
        UsageError: no such file, or not a YAML mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UsageError("file", str(file), f"not readable as YAML: {error}") from None
    if not isinstance(content, dict):
        raise UsageError("file", str(file), "must hold a mapping, such as `id: my-task-v1`")
    return content


def text(declaration: dict[str, Any]) -> str:
    """A declaration as YAML that ``read`` understands."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml, stream = YAML(typ="safe", pure=True), StringIO()
    yaml.default_flow_style, yaml.width = False, 120
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # its type is that of its default, None
    yaml.dump(declaration, stream)
    return stream.getvalue()


def build(kind: type[Declared], given: object, section: str = "") -> Declared:
    """A dataclass from a mapping with its fields.

    Args:
        section: what the mapping is in, for messages: ``recipe``.

    Raises:
        UsageError: not a mapping; an unknown or a missing field; or what the dataclass itself refuses.
    """
    known = {item.name: item for item in fields(kind)}
    prefix = f"{section}." if section else ""
    if not isinstance(given, dict):
        raise UsageError(section or "declaration", given, f"write a mapping with some of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise UsageError(f"{prefix}{name}", given[name], f"unknown field; {closest(name, known)}")
    for name, item in known.items():
        if name not in given and item.default is MISSING and item.default_factory is MISSING:
            raise UsageError(f"{prefix}{name}", None, "missing; every declaration needs it")
    try:
        return kind(**given)
    except UsageError as error:
        raise (error.under(section) if section else error) from None


def plain(instance: Any) -> dict[str, Any]:
    """A dataclass as plain data that ``build`` takes back; what is at its default is left out."""
    found = {}
    for item in fields(instance):
        value = getattr(instance, item.name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if value != default:
            found[item.name] = plain(value) if is_dataclass(value) else value
    return found


def check_text(name: str, given: object) -> None:
    """Raise ``UsageError`` unless ``given`` is a string with something in it."""
    if not isinstance(given, str) or not given.strip():
        raise UsageError(name, given, "must be a text that is not empty")


def check_whole(name: str, given: object, least: int = 1) -> None:
    """Raise ``UsageError`` unless ``given`` is a whole number of at least ``least``."""
    if type(given) is not int or given < least:
        raise UsageError(name, given, f"must be a whole number of at least {least}")


def check_list(name: str, given: object, kind: type | tuple[type, ...], words: str, empty: bool = False) -> None:
    """Raise ``UsageError`` unless ``given`` is a list of ``kind``; ``words`` says that in words."""
    if not isinstance(given, list) or not (given or empty) or not all(type(item) in _kinds(kind) for item in given):
        raise UsageError(name, given, f"write a list of {words}")


def check_rates(name: str, given: Iterable[float]) -> None:
    """Raise ``UsageError`` unless ``given`` is a list of learning rates."""
    check_list(name, given, (int, float), "learning rates, such as [1e-4, 1e-5]")
    for rate in given:
        if not 0 < rate < float("inf"):
            raise UsageError(name, rate, "a learning rate must be > 0")


def _kinds(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)
