"""What ``--help`` of a Hydra script shows: the most used settings, their defaults and comments, out of its config."""

import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

import yaml

from nemo_tiedlora.own_methods import LOADED

#: What is listed, by section; an empty string stands for all that an earlier scheme does not have just like this.
MOST_USED = {
    "model.peft": "peft_scheme restore_from_path",
    # Every method's section: a test compares them with the registry.
    "model.peft.tied_lora_tuning": "",
    "model.peft.vera_tuning": "",
    "model.peft.share_lora_tuning": "",
    "model.peft.cond_lora_tuning": "",
    "model.peft.lora_xs_tuning": "",
    "model.peft.uni_lora_tuning": "",
    "model.peft.dyna_lora_tuning": "",
    "model": "restore_from_path seed global_batch_size micro_batch_size"
    " tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel",
    "model.data.train_ds": "file_names prompt_template label_key truncation_field max_seq_length",
    "model.data.validation_ds": "file_names metric.name tokens_to_generate",
    "model.data.test_ds": "file_names",
    "model.data": "chat",
    "model.optim": "lr sched.warmup_steps",
    "trainer": "max_steps val_check_interval precision devices",
    "exp_manager": "exp_dir name create_wandb_logger",
    "": "verbose",
}


class Setting(NamedTuple):
    """A line of the config.

    Args:
        value: its default as the config writes it; empty for a section.
        comment: what the config says about it, on the lines above and behind.
    """

    value: str
    comment: str


def help_text(purpose: str, command: str, config: Path) -> str:
    """The help of ``command``, which does what ``purpose`` says and composes ``config``."""
    settings = read(config.read_text(encoding="utf-8"))
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    lines = [purpose, "", f"Usage: {command} [SETTING=VALUE ...]", ""]
    lines += textwrap.wrap(
        "Without any setting, a small built-in base learns a built-in task. The most used settings and their defaults"
        " follow; put the name of the section before theirs, as in model.optim.lr=1e-3.",
        width,
    )
    explained: dict[str, str] = {}
    for section, chosen in MOST_USED.items():
        about = settings[section].comment if section else ""
        lines += ["", *textwrap.wrap(": ".join(filter(None, (section, about))), width, subsequent_indent="    ")]
        names, again = chosen.split(), []
        for name in _below(settings, section) if not names else ():
            default, comment = settings[f"{section}.{name}"]
            (names if comment or explained.get(name) != default else again).append(name)
            explained.setdefault(name, default)
        for name in names:
            lines += _shown(name, settings[f"{section}.{name}".lstrip(".")], width)
        if again:
            also = f"and, as above, {', '.join(again)}"
            lines += textwrap.wrap(also, width, initial_indent="  ", subsequent_indent="  ")
    for path in LOADED:
        from nemo_tiedlora.variants import METHODS

        for method in METHODS.values():
            if (where := f"model.peft.{method.scheme}_tuning") not in settings:
                lines += ["", *textwrap.wrap(f"{where}: {method.summary} ({path.name})", width)]
                for name, value in method.settings().items():
                    lines += _shown(name, Setting(json.dumps(value), ""), width)
    lines += [
        "",
        f"All settings: {config}",
        "--methods FILE.py adds the methods of a file of your own, with their settings.",
        "--cfg job prints them as a run would take them; --hydra-help is about Hydra.",
    ]
    return "\n".join(lines)


def read(text: str) -> dict[str, Setting]:
    """Every setting and section of a YAML text by its full name, ``model.optim.lr``."""
    lines = text.splitlines()
    found = {}

    def walk(section: yaml.MappingNode, prefix: str) -> None:
        for key, value in section.value:
            block = isinstance(value, yaml.MappingNode) and not value.flow_style
            end = key.end_mark if block else value.end_mark
            above = key.start_mark.line
            while above and lines[above - 1].lstrip().startswith("#"):
                above -= 1
            comments = [line.lstrip(" #") for line in lines[above : key.start_mark.line]]
            comments += re.findall(r"#\s*(.*)", lines[end.line][end.column :]) if end.line < len(lines) else []
            default = "" if block else text[value.start_mark.index : value.end_mark.index]
            found[prefix + key.value] = Setting(default, " ".join(comments))
            if block:
                walk(value, f"{prefix}{key.value}.")

    walk(yaml.compose(text), "")
    return found


def _below(settings: dict[str, Setting], section: str) -> list[str]:
    return [name.removeprefix(f"{section}.") for name in settings if name.startswith(f"{section}.")]


def _shown(name: str, setting: Setting, width: int) -> list[str]:
    """``name=default  comment``; ``${demo:x,y}`` as a default means x for the built-in task and y for own data."""
    demo = re.fullmatch(r"\${demo:([^,]*),(.*)}", setting.value)
    comment = f"{setting.comment} (built-in task: {demo[1]})".strip() if demo else setting.comment
    indent = " " * 36
    first = f"  {name}={demo[2] if demo else setting.value}".ljust(len(indent) - 2) + "  "
    if not comment:
        return [first.rstrip()]
    if len(first) > len(indent):
        return [first.rstrip(), *textwrap.wrap(comment, width, initial_indent=indent, subsequent_indent=indent)]
    return textwrap.wrap(comment, width, initial_indent=first, subsequent_indent=indent)
