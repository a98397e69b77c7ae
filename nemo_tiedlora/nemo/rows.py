"""Rows of the user's data files, read and checked in the seconds before NeMo is imported.

A file holds one JSON object per line, in UTF-8. Its rows are fields of a prompt template or, with
``model.data.chat=true``, conversations in one of two forms:

    {"messages": [{"role": "system", "content": ...}, {"role": "user", "content": ...}, {"role": "assistant", ...}]}
    {"system": ..., "mask": "User", "conversations": [{"from": "User", "value": ...}, {"from": "Assistant", ...}]}

The second is NeMo's own. All rows of a file have the form of its first one.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from nemo_tiedlora.errors import UsageError, check_choice, closest

#: Bytes of a line, at most: more is no row but a file without line ends.
LONGEST_LINE = 16 * 2**20
ROLES = ("system", "user", "assistant")
#: What NeMo takes ``type`` of a conversation to be.
TYPES = (None, "TEXT_TO_VALUE", "VALUE_TO_TEXT")
#: NeMo's name for who is not learned, where a conversation does not say.
MASK = "User"
TRUNCATION_METHODS = ("left", "right")

#: What is wrong with a row, or None.
Problem = str | None


def check_data(section: DictConfig, field: str, chat: bool = False) -> None:
    """Check every row of a dataset's files, against its prompt template or as chat.

    Raises:
        UsageError: for the first thing that is wrong, with the file's name and the line.
    """
    names = section.get("file_names")
    if names is None or names == []:
        raise UsageError(f"{field}.file_names", names, "name at least one JSONL file, e.g. [train.jsonl]")
    if not isinstance(names, ListConfig):
        raise UsageError(f"{field}.file_names", names, f"write a list: [{names}]")
    for name in names:
        if not isinstance(name, str) or not name:
            raise UsageError(f"{field}.file_names", name, "must be the name of a JSONL file")
    template = None if chat else check_template(section, field)
    for name in names:
        check = chat_row(Path(name), f"{field}.file_names") if chat else template
        for number, row in read_rows(Path(name), f"{field}.file_names"):
            if problem := check(row):
                raise UsageError(f"{field}.file_names", name, f"line {number}{problem}")


def read_rows(path: Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every row of a file with its line number, from 1.

    Raises:
        UsageError: no such file, no rows in it, or a line that is not a JSON object in UTF-8.
    """
    if not path.is_file():
        raise UsageError(field, str(path), "a folder, not a file" if path.is_dir() else "no such file")
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                try:
                    yield number, _row(line, number)
                except ValueError as error:
                    raise UsageError(field, str(path), f"line {number} {error}") from None
    except OSError as error:
        raise UsageError(field, str(path), f"cannot be read ({error.strerror})") from None
    if not number:
        raise UsageError(field, str(path), "the file is empty")


def first_row(path: str | Path, field: str = "file_names") -> dict[str, Any]:
    """A file's first row."""
    return next(read_rows(Path(path), field))[1]


def _row(line: bytes, number: int) -> dict[str, Any]:
    """A line's JSON object; ValueError says what it is instead."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"has more than {LONGEST_LINE // 2**20} MiB; write one JSON object per line")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        encoding = "UTF-16" if b"\0" in line else "another encoding"
        raise ValueError(f"is not UTF-8 text; the file is in {encoding}, save it as UTF-8") from None
    if number == 1:
        text = text.removeprefix("\ufeff")
    if not text.strip():
        raise ValueError("is empty; every line must be a JSON object")
    try:
        row = json.loads(text)
    except RecursionError:
        raise ValueError("is not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    return row


def _text(name: str, value: object) -> Problem:
    """The problem with a value that must be text."""
    if not isinstance(value, str):
        return f": {name} is {_short(value)}; it must be text"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f": {name} has half a surrogate pair (such as \\ud800), which is no character; remove it"
    return None


def _short(value: object) -> str:
    shown = json.dumps(value, ensure_ascii=True)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def check_template(section: DictConfig, field: str) -> Callable[[dict[str, Any]], Problem]:
    """Check a section's prompt template; the result finds what is wrong with a row of it."""
    template, label = section.prompt_template, section.label_key
    if not isinstance(template, str):
        raise UsageError(f"{field}.prompt_template", template, 'write text such as "{input} {output}"')
    if not isinstance(label, str) or not label:
        raise UsageError(f"{field}.label_key", label, "must be the name of the field to learn")
    names = re.findall(r"{(.*?)}", template)
    if not template.endswith(f"{{{label}}}"):
        raise UsageError(f"{field}.prompt_template", template, f"must end with the label_key, {{{label}}}")
    for name in names:
        if not name or "{" in name:
            raise UsageError(f"{field}.prompt_template", template, "name one field in each pair of braces")
    if names.count(label) > 1:
        raise UsageError(f"{field}.prompt_template", template, f"gives the answer away: {{{label}}} is in the prompt")
    cut = section.get("truncation_field")
    if not isinstance(cut, str | None):
        raise UsageError(f"{field}.truncation_field", cut, "must be the names of fields with commas between, or null")
    for name in filter(None, (cut or "").split(",")):
        if name not in names:
            raise UsageError(f"{field}.truncation_field", name, f"not in the prompt template; {closest(name, names)}")
    check_choice(f"{field}.truncation_method", section.get("truncation_method", "right"), TRUNCATION_METHODS)
    prompt = re.sub(r"{.*?}", "", template)

    def problem(row: dict[str, Any]) -> Problem:
        for name in names:
            if name not in row:
                return f" has no field {name!r} of the prompt template; {closest(name, row)}"
            if wrong := _text(repr(name), row[name]):
                return wrong
        if not prompt.strip() and not any(row[name].strip() for name in names[:-1]):
            return f": there is no text before {label!r}"
        if not row[label].strip(" ") and not section.get("add_eos"):
            return f": {label!r} is empty, so that there is nothing to learn"
        return None

    return problem


def chat_form(row: dict[str, Any]) -> str | None:
    """``messages`` or ``conversations``: the key that says which form of chat a row has; None for neither."""
    forms = [form for form in ("messages", "conversations") if form in row]
    return forms[0] if len(forms) == 1 else None


def chat_row(path: Path, field: str) -> Callable[[dict[str, Any]], Problem]:
    """What finds out what is wrong with a row of a chat file, whose first row says which form all have."""
    file_form = chat_form(first_row(path, field))

    def problem(row: dict[str, Any]) -> Problem:
        form = chat_form(row)
        if form is None:
            both = "messages" in row
            return f" has {'both' if both else 'neither'} 'messages' {'and' if both else 'nor'} 'conversations'; " + (
                "keep one" if both else "set model.data.chat=false for rows that are no chat"
            )
        if form != file_form:
            return f" has {form!r}, line 1 has {file_form!r}; put the two forms into files of their own"
        return _messages(row["messages"]) if form == "messages" else _conversation(row)

    return problem


def _messages(messages: object) -> Problem:
    if not isinstance(messages, list) or not messages:
        return ": 'messages' must be a list of messages"
    roles = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            return f": {where} is {_short(message)}; it must have a role and a content"
        role = message.get("role")
        if role not in ROLES:
            return f": the role of {where} is {_short(role)}; {closest(role, ROLES)}"
        if wrong := _text(f"the content of {where}", message.get("content")):
            return wrong
        if not message["content"].strip() and role != "system":
            return f": the content of {where} ({role}) is empty"
        if role == "system" and roles:
            return f": {where} is the system's; only the first message can be"
        if role == "assistant" and roles[-1:] in ([], ["system"]):
            return f": {where} is the assistant's, and there is nothing to answer yet; begin with the user"
        roles.append(role)
    if "assistant" not in roles:
        return ": there is no message of the assistant, so that there is nothing to learn"
    return None


def _conversation(row: dict[str, Any]) -> Problem:
    if "system" not in row:
        return " has no 'system'; NeMo's chat rows have it beside 'conversations', if only \"\""
    if wrong := _text("'system'", row["system"]):
        return wrong
    kind = row.get("type")
    if kind not in TYPES:
        return f": 'type' is {_short(kind)}; {closest(kind, TYPES[1:])}, or null"
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        return ": 'conversations' must be a list of turns"
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            return f": turn {number} is {_short(turn)}; it must have 'from' and 'value'"
        for name in ("from", "value"):
            if wrong := _text(f"{name!r} of turn {number}", turn.get(name)):
                return wrong
        if not turn["from"] or not turn["value"].strip():
            return f": {'from' if not turn['from'] else 'value'!r} of turn {number} is empty"
        if turn.get("label") is not None and (wrong := _text(f"'label' of turn {number}", turn["label"])):
            return wrong
    mask = row.get("mask", MASK)
    if wrong := _text("'mask'", mask):
        return wrong
    speakers = [turn["from"] for turn in turns]
    for name in mask.split(","):
        if name not in speakers:
            return f": 'mask' is {mask!r}, who does not speak; {closest(name, dict.fromkeys(speakers))}"
    if not any(speaker not in mask for speaker in speakers[kind != "TEXT_TO_VALUE" :]):
        return ": every turn is masked, so that there is nothing to learn"
    return None
