"""What other packages use of this one, the benchmark suite among them: these names, and no others.

Reading one imports what it needs and nothing else, so that what is cheap stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_tiedlora import __version__
    from nemo_tiedlora.attach.placed import sizes as linear_sizes
    from nemo_tiedlora.console import run as run_command
    from nemo_tiedlora.console import show
    from nemo_tiedlora.embedded.tasks import TASKS as BUILTIN_TASKS
    from nemo_tiedlora.embedded.tasks import rows as builtin_rows
    from nemo_tiedlora.errors import RunError, UsageError, check_choice, closest, first_line
    from nemo_tiedlora.files import check_output, content_of, replacing, sha256_of, write_text
    from nemo_tiedlora.huggingface.attached import attach as attach_to_transformers
    from nemo_tiedlora.huggingface.bases import BUILTIN, base_at
    from nemo_tiedlora.huggingface.heads import heads_of
    from nemo_tiedlora.huggingface.placing import found as found_on
    from nemo_tiedlora.huggingface.placing import known as known_family
    from nemo_tiedlora.huggingface.quiet import quiet as quiet_transformers
    from nemo_tiedlora.job.workbench import Job, Workbench, workbench
    from nemo_tiedlora.model.config import nemo_config
    from nemo_tiedlora.model.sizes import check_fit, lora_size, sizes
    from nemo_tiedlora.model.targets import NAMES as TARGET_NAMES
    from nemo_tiedlora.options import AsJson, BaseName
    from nemo_tiedlora.own_methods import EPILOG
    from nemo_tiedlora.own_methods import take as take_methods
    from nemo_tiedlora.platform.threads import use_one_thread, wait_passively
    from nemo_tiedlora.variants import METHODS, OF_YOUR_OWN, TiedConfig, config_for, count
    from nemo_tiedlora.variants import build as build_variant

#: Where each name lives, and what it is called there.
_HOMES: dict[str, tuple[str, str]] = {
    "AsJson": ("nemo_tiedlora.options", "AsJson"),
    "BUILTIN": ("nemo_tiedlora.huggingface.bases", "BUILTIN"),
    "BUILTIN_TASKS": ("nemo_tiedlora.embedded.tasks", "TASKS"),
    "BaseName": ("nemo_tiedlora.options", "BaseName"),
    "EPILOG": ("nemo_tiedlora.own_methods", "EPILOG"),
    "Job": ("nemo_tiedlora.job.workbench", "Job"),
    "METHODS": ("nemo_tiedlora.variants", "METHODS"),
    "OF_YOUR_OWN": ("nemo_tiedlora.variants", "OF_YOUR_OWN"),
    "RunError": ("nemo_tiedlora.errors", "RunError"),
    "TARGET_NAMES": ("nemo_tiedlora.model.targets", "NAMES"),
    "TiedConfig": ("nemo_tiedlora.variants", "TiedConfig"),
    "UsageError": ("nemo_tiedlora.errors", "UsageError"),
    "Workbench": ("nemo_tiedlora.job.workbench", "Workbench"),
    "__version__": ("nemo_tiedlora", "__version__"),
    "attach_to_transformers": ("nemo_tiedlora.huggingface.attached", "attach"),
    "base_at": ("nemo_tiedlora.huggingface.bases", "base_at"),
    "build_variant": ("nemo_tiedlora.variants", "build"),
    "builtin_rows": ("nemo_tiedlora.embedded.tasks", "rows"),
    "check_choice": ("nemo_tiedlora.errors", "check_choice"),
    "check_fit": ("nemo_tiedlora.model.sizes", "check_fit"),
    "check_output": ("nemo_tiedlora.files", "check_output"),
    "closest": ("nemo_tiedlora.errors", "closest"),
    "config_for": ("nemo_tiedlora.variants", "config_for"),
    "content_of": ("nemo_tiedlora.files", "content_of"),
    "count": ("nemo_tiedlora.variants", "count"),
    "first_line": ("nemo_tiedlora.errors", "first_line"),
    "found_on": ("nemo_tiedlora.huggingface.placing", "found"),
    "heads_of": ("nemo_tiedlora.huggingface.heads", "heads_of"),
    "known_family": ("nemo_tiedlora.huggingface.placing", "known"),
    "linear_sizes": ("nemo_tiedlora.attach.placed", "sizes"),
    "lora_size": ("nemo_tiedlora.model.sizes", "lora_size"),
    "nemo_config": ("nemo_tiedlora.model.config", "nemo_config"),
    "quiet_transformers": ("nemo_tiedlora.huggingface.quiet", "quiet"),
    "replacing": ("nemo_tiedlora.files", "replacing"),
    "run_command": ("nemo_tiedlora.console", "run"),
    "sha256_of": ("nemo_tiedlora.files", "sha256_of"),
    "show": ("nemo_tiedlora.console", "show"),
    "sizes": ("nemo_tiedlora.model.sizes", "sizes"),
    "take_methods": ("nemo_tiedlora.own_methods", "take"),
    "use_one_thread": ("nemo_tiedlora.platform.threads", "use_one_thread"),
    "wait_passively": ("nemo_tiedlora.platform.threads", "wait_passively"),
    "workbench": ("nemo_tiedlora.job.workbench", "workbench"),
    "write_text": ("nemo_tiedlora.files", "write_text"),
}

__all__ = [
    "BUILTIN",
    "BUILTIN_TASKS",
    "EPILOG",
    "METHODS",
    "OF_YOUR_OWN",
    "TARGET_NAMES",
    "AsJson",
    "BaseName",
    "Job",
    "RunError",
    "TiedConfig",
    "UsageError",
    "Workbench",
    "__version__",
    "attach_to_transformers",
    "base_at",
    "build_variant",
    "builtin_rows",
    "check_choice",
    "check_fit",
    "check_output",
    "closest",
    "config_for",
    "content_of",
    "count",
    "first_line",
    "found_on",
    "heads_of",
    "known_family",
    "linear_sizes",
    "lora_size",
    "nemo_config",
    "quiet_transformers",
    "replacing",
    "run_command",
    "sha256_of",
    "show",
    "sizes",
    "take_methods",
    "use_one_thread",
    "wait_passively",
    "workbench",
    "write_text",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
