"""A model's config as plain data, which is read without NeMo; and YAML as NeMo's own configs read and write it."""

import re
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from nemo_tiedlora.extras import lacking

#: What some reader of YAML takes for true or false.
TRUTHS = {
    form(word)
    for word in ("y", "n", "yes", "no", "true", "false", "on", "off")
    for form in (str.lower, str.capitalize, str.upper)
}


class ModelConfig(dict[str, Any]):
    """A NeMo GPT's model config, whose fields are attributes too, as those of NeMo's own are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name}") from None

    def copy(self) -> "ModelConfig":
        return ModelConfig(self)


def over(content: Mapping[str, Any], more: Mapping[str, Any]) -> ModelConfig:
    """A copy of ``content`` with ``more`` in it: sections are joined, and whatever else is in both is of ``more``."""
    joined = ModelConfig(content)
    for name, value in more.items():
        before = joined.get(name)
        joined[name] = dict(over(before, value)) if isinstance(before, dict) and isinstance(value, dict) else value
    return joined


def load(text: str) -> Any:
    """What YAML says, if a name is there once at most; ``1e-5`` is a number, and a date is text.

    Raises:
        yaml.YAMLError: it is damaged, or has a tag.
    """
    return yaml_reader().load(text, Loader=_loader())  # a SafeLoader, which makes nothing but plain data


def dump(content: Mapping[str, Any], sort_keys: bool = False) -> str:
    """``content`` as YAML: byte by byte what OmegaConf writes of it."""
    options = {"default_flow_style": False, "allow_unicode": True, "sort_keys": sort_keys}
    return yaml_reader().dump(dict(content), Dumper=_dumper(), **options)


def yaml_reader() -> ModuleType:
    """PyYAML, which the core does without.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise lacking(error) or error from None
    return yaml


@cache
def _loader() -> Any:
    yaml: Any = yaml_reader()

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]
            if len(set(names)) < len(names):
                raise yaml.constructor.ConstructorError(problem="a name is there twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    resolvers = Loader.yaml_implicit_resolvers.items()
    Loader.yaml_implicit_resolvers = {
        first: [one for one in own if one[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
        for first, own in resolvers
    }
    numbers = r"""^(?:
         [-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
        |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$"""
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(numbers, re.X), list("-+0123456789."))
    return Loader


@cache
def _dumper() -> Any:
    yaml: Any = yaml_reader()

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data):
            return True  # which no reader here takes

    def text(dumper, value):
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if _looks_otherwise(value) else None)

    Dumper.add_representer(str, text)
    return Dumper


def _looks_otherwise(text: str) -> bool:
    """Whether some reader of YAML would take a text for a number or a truth value."""
    if text in TRUTHS:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
