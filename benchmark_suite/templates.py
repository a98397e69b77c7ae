"""Prompts and answers written as Jinja over the fields of a row.

A *template* gives text (``Question: {{ question }}``), an *expression* any value (``choices.label.index(answerKey)``).
Specs may come from other people, so both run in Jinja's sandbox.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from nemo_tiedlora.facade import UsageError

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment


def check_template(name: str, source: str) -> None:
    """Raise ``UsageError`` unless ``source`` is a Jinja template."""
    _check(name, source, expression=False)


def check_expression(name: str, source: str) -> None:
    """Raise ``UsageError`` unless ``source`` is a Jinja expression."""
    _check(name, source, expression=True)


@cache
def mentions(source: str, name: str) -> bool:
    """Whether a template uses a field called ``name``."""
    from jinja2 import meta

    return name in meta.find_undeclared_variables(_environment().parse(source))


def render(name: str, source: str, row: Mapping[str, Any]) -> str:
    """The text that a template gives for a row.

    Raises:
        UsageError: the row lacks a field or has one of another kind than the template expects.
    """
    return _run(name, source, row, expression=False)


def evaluate(name: str, source: str, row: Mapping[str, Any]) -> Any:
    """The value that an expression gives for a row.

    Raises:
        UsageError: as for ``render``.
    """
    return _run(name, source, row, expression=True)


def _check(name: str, source: object, expression: bool) -> None:
    if not isinstance(source, str):
        raise UsageError(name, source, "must be a text")
    _compiled(name, source, expression)


def _run(name: str, source: str, row: Mapping[str, Any], expression: bool) -> Any:
    from jinja2 import TemplateError, Undefined

    compiled = _compiled(name, source, expression)
    try:
        value = compiled(row) if expression else compiled.render(row)
        if isinstance(value, Undefined):
            str(value)  # a strict undefined value says what is missing when it is used
        return value
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UsageError(name, source, f"{error}; the row has {', '.join(map(str, row))}") from None


@cache
def _compiled(name: str, source: str, expression: bool):
    from jinja2 import TemplateSyntaxError

    try:
        if expression:
            return _environment().compile_expression(source, undefined_to_none=False)
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise UsageError(name, source, f"not valid Jinja: {error.message}") from None


@cache
def _environment() -> "SandboxedEnvironment":
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    # Jinja's own make 0 of what is no number: a label that nobody gave.
    environment.filters |= {"wikihow": wikihow, "int": _whole, "float": float}
    return environment


def _whole(value: Any) -> int:
    whole = int(value)
    if isinstance(value, float) and value != whole:
        raise ValueError(f"{value} is not a whole number")
    return whole


def wikihow(text: str) -> str:
    """HellaSwag without the marks of its WikiHow part, as lm-evaluation-harness takes them out."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
