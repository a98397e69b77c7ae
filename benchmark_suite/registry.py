"""Tasks and variants by name, in the manner of Gymnasium."""

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from benchmark_suite.declared import read
from benchmark_suite.task_spec import TaskSpec
from benchmark_suite.variant_spec import VariantSpec
from nemo_tiedlora.facade import UsageError, closest

if TYPE_CHECKING:
    from benchmark_suite.environment import TaskEnvironment
    from benchmark_suite.task import Task

_HERE = Path(__file__).parent
Named = TypeVar("Named", TaskSpec, VariantSpec)


class Registry(dict[str, Named], Generic[Named]):
    """Specs by name; a name means one thing only."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def add(self, name: str, given: Named) -> None:
        """Raises ``UsageError`` where the name stands for something else already."""
        if self.get(name, given) != given:
            raise UsageError(self.what, name, "registered already, and not the same; give it another name or version")
        self[name] = given

    def __missing__(self, name: object) -> Named:
        raise UsageError(self.what, name, closest(name, sorted(self)))


@cache
def _tasks() -> Registry[TaskSpec]:
    registry: Registry[TaskSpec] = Registry("task")
    for found in _read_tasks(_HERE / "tasks"):
        registry.add(found.id, found)
    return registry


@cache
def _variants() -> Registry[VariantSpec]:
    registry: Registry[VariantSpec] = Registry("variant")
    for file in sorted((_HERE / "variants").glob("*.yaml")):
        found = VariantSpec.from_dict(read(file))
        registry.add(found.name, found)
    return registry


def register(spec: TaskSpec) -> None:
    """Add a task.

    Raises:
        UsageError: another one of this id is there.
    """
    _tasks().add(spec.id, spec)
    _as_environments([spec.id])


def register_folder(path: str | Path) -> list[str]:
    """Add the tasks of all YAML files in a folder; their ids. Relative data folders in them are beside the files.

    Raises:
        UsageError: no such folder, nothing in it, or a file that is not a valid task; nothing is added then.
    """
    if not Path(path).is_dir():
        raise UsageError("tasks_path", str(path), "no such folder")
    found = _read_tasks(Path(path))
    if not found:
        raise UsageError("tasks_path", str(path), "no .yaml file in this folder")
    together: Registry[TaskSpec] = Registry("task")
    together.update(_tasks())
    for each in found:
        together.add(each.id, each)
    _tasks().update(together)
    _as_environments([each.id for each in found])
    return [each.id for each in found]


def register_variant(spec: VariantSpec) -> None:
    """Add a variant, after the plugin has checked its settings. Imports torch.

    Raises:
        UsageError: bad settings, or another variant of this name is there.
    """
    spec.check()
    _variants().add(spec.name, spec)


def register_variants(path: str | Path) -> list[str]:
    """Add the variants of all YAML files in a folder; their names. Imports torch.

    Raises:
        UsageError: no such folder, nothing in it, or a file that is not a valid variant; nothing is added then.
    """
    files = sorted(Path(path).glob("*.yaml"))
    if not files:
        raise UsageError("variants_path", str(path), "no such folder, or no .yaml file in it")
    together: Registry[VariantSpec] = Registry("variant")
    together.update(_variants())
    found = [VariantSpec.from_dict(read(file)) for file in files]
    for each in found:
        each.check()
        together.add(each.name, each)
    _variants().update(together)
    return [each.name for each in found]


def spec(id: str) -> TaskSpec:
    """The task of this id.

    Raises:
        UsageError: unknown, with the closest id.
    """
    return _tasks()[id]


def make(id: str, data_root: str | Path | None = None, limit: int | None = None) -> "TaskEnvironment":
    """A task as a Gymnasium environment, which gives an example after the other and takes the answers.

    Args:
        data_root, limit: as for ``load_task``.

    Raises:
        UsageError: unknown, with the closest id; or no such folder.
    """
    spec(id)
    import gymnasium

    from benchmark_suite.environment import NAMESPACE

    return gymnasium.make(f"{NAMESPACE}/{id}", data_root=data_root, limit=limit).unwrapped  # type: ignore[return-value]


def load_task(id: str, data_root: str | Path | None = None, limit: int | None = None) -> "Task":
    """A task with its data, usable without any model.

    Args:
        data_root: folder with ``<dataset>/{train,validation,test}.jsonl`` (or Parquet, CSV); None downloads from the
            Hugging Face Hub. Generated tasks need neither.
        limit: use the first so many examples of each split.

    Raises:
        UsageError: unknown, with the closest id; or no such folder.
    """
    from benchmark_suite.task import Task

    return Task(spec(id), data_root, limit)


def list_tasks(group: str | None = None) -> list[str]:
    """The ids of all tasks, or of those of a group.

    Raises:
        UsageError: no such group, with the closest one.
    """
    if group is not None and group not in list_groups():
        raise UsageError("group", group, closest(group, list_groups()))
    return [id for id, found in sorted(_tasks().items()) if group is None or group in found.groups]


def list_groups() -> list[str]:
    """The names of all groups of tasks."""
    return sorted({group for found in _tasks().values() for group in found.groups})


def variant(name: str) -> VariantSpec:
    """The variant of this name.

    Raises:
        UsageError: unknown, with the closest name.
    """
    return _variants()[name]


def list_variants() -> list[str]:
    """The names of all variants."""
    return list(_variants())


def _as_environments(ids: list[str]) -> None:
    """Tell Gymnasium of further tasks, where it knows of the others."""
    if environment := sys.modules.get("benchmark_suite.environment"):
        for id in ids:
            environment.register(id)


def _read_tasks(folder: Path) -> list[TaskSpec]:
    found = []
    for file in sorted(folder.glob("*.yaml")):
        try:
            found.append(TaskSpec.from_dict(read(file)).at(str(file.parent)))
        except UsageError as error:
            raise error if error.field == "file" else error.under(file.name) from None
    return found
