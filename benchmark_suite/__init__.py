"""Fine-tuning methods compared on equal terms: tasks by versioned name, their data, prompts and metrics.

    import benchmark_suite

    env = benchmark_suite.make("gsm8k-v1", data_root="data")  # a Gymnasium environment
    prompt, info = env.reset(seed=0)
    prompt, reward, terminated, truncated, info = env.step("... #### 42")

    task = benchmark_suite.load_task("gsm8k-v1", data_root="data")
    scores = task.score([example.target for example in task.examples("validation")])

Importing this package is cheap: libraries are imported by what needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmark_suite.environment import TaskEnvironment
    from benchmark_suite.example import Example
    from benchmark_suite.registry import (
        list_groups,
        list_tasks,
        list_variants,
        load_task,
        make,
        register,
        register_folder,
        register_variant,
        register_variants,
        spec,
        variant,
    )
    from benchmark_suite.task import Task
    from benchmark_suite.task_spec import TaskSpec
    from benchmark_suite.variant_spec import VariantSpec

_HOMES = {
    "environment": ("TaskEnvironment",),
    "registry": (
        "list_groups",
        "list_tasks",
        "list_variants",
        "load_task",
        "make",
        "register",
        "register_folder",
        "register_variant",
        "register_variants",
        "spec",
        "variant",
    ),
    "example": ("Example",),
    "task": ("Task",),
    "task_spec": ("TaskSpec",),
    "variant_spec": ("VariantSpec",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Example",
    "Task",
    "TaskEnvironment",
    "TaskSpec",
    "VariantSpec",
    "list_groups",
    "list_tasks",
    "list_variants",
    "load_task",
    "make",
    "register",
    "register_folder",
    "register_variant",
    "register_variants",
    "spec",
    "variant",
]


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
