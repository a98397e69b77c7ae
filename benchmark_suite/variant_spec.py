"""What a variant is: a fine-tuning method with its settings, ranks and learning rates."""

import json
from dataclasses import dataclass, field
from typing import Any

from benchmark_suite.declared import build, check_list, check_rates, check_text, plain
from nemo_tiedlora.facade import UsageError, closest

#: What a scheme begins with that is a method of Hugging Face PEFT, followed by its ``PeftType``: ``peft:vera``.
PEFT = "peft:"
#: Baselines, whose settings NeMo checks: scheme → the section of its settings under model.peft, and its setting for
#: what a rank is to LoRA.
STOCK: dict[str, tuple[str | None, str | None]] = {
    "lora": ("lora_tuning", "adapter_dim"),
    "adapter": ("adapter_tuning", "adapter_dim"),
    "parallel_adapter": ("adapter_tuning", "adapter_dim"),
    "ia3": ("ia3_tuning", None),
    "ptuning": ("p_tuning", "virtual_tokens"),
    "selective": ("selective_tuning", None),
    "none": (None, None),
}


@dataclass(frozen=True, kw_only=True)
class VariantSpec:
    """A variant.

    Args:
        name: as in tables.
        description: one line, for people.
        scheme: ``model.peft.peft_scheme``: a method of the plugin, which ``check`` looks for, or one of ``STOCK``; or
            ``peft:`` and the name of a method of Hugging Face PEFT, for the host ``hf``.
        settings: of the scheme, beside its rank; of PEFT's, keywords of its config.
        ranks: ranks to compare; of p-tuning, numbers of virtual tokens. Empty where there is nothing of the kind.
        lr: learning rates to choose from where a task names none for this variant; empty: the task's own.
        citation: where the method comes from.

    Raises:
        UsageError: for the first thing that is wrong.
    """

    name: str
    description: str
    scheme: str
    settings: dict[str, Any] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    citation: str = ""

    def __post_init__(self):
        check_text("name", self.name)
        check_text("description", self.description)
        check_text("scheme", self.scheme)
        if not isinstance(self.settings, dict):
            raise UsageError("settings", self.settings, "write a mapping, such as {preset: TL6}")
        check_list("ranks", self.ranks, int, "whole numbers", empty=True)
        for rank in self.ranks:
            if rank < 1:
                raise UsageError("ranks", rank, "must be at least 1")
        if bool(self.ranks) != bool(self.rank_setting):
            way_out = "name some, such as [8]" if self.rank_setting else f"{self.scheme} has none; leave it out"
            raise UsageError("ranks", self.ranks, way_out)
        if self.rank_setting in self.settings:
            raise UsageError(f"settings.{self.rank_setting}", self.settings[self.rank_setting], "set it by ranks")
        if self.lr:
            check_rates("lr", self.lr)

    @property
    def is_peft(self) -> bool:
        """Whether it is a method of Hugging Face PEFT."""
        return self.scheme.startswith(PEFT)

    @property
    def section(self) -> str | None:
        """The section of the settings under ``model.peft``; None for full fine-tuning."""
        return STOCK[self.scheme][0] if self.scheme in STOCK else f"{self.scheme}_tuning"

    @property
    def rank_setting(self) -> str | None:
        """The setting that a rank goes to; of PEFT's methods, some of which have none, ``r`` where ranks are named."""
        if self.is_peft:
            return "r" if self.ranks else None
        return STOCK[self.scheme][1] if self.scheme in STOCK else "rank"

    def settings_at(self, rank: int | None = None) -> dict[str, Any]:
        """The scheme's settings with a rank, by default the first of ``ranks``.

        Raises:
            UsageError: a rank for a scheme without one.
        """
        if rank is not None and not self.rank_setting:
            raise UsageError("rank", rank, f"{self.name} has none")
        if not self.rank_setting:
            return dict(self.settings)
        return self.settings | {self.rank_setting: self.ranks[0] if rank is None else rank}

    def overrides(self, rank: int | None = None) -> list[str]:
        """The variant as Hydra overrides of the fine-tuning job, such as ``model.peft.peft_scheme=vera``.

        Raises:
            UsageError: it is PEFT's, which the job does not run.
        """
        if self.is_peft:
            raise UsageError("scheme", self.scheme, "is Hugging Face PEFT's: the suite runs it, with --host hf")
        settings = self.settings_at(rank).items()
        values = (f"model.peft.{self.section}.{name}={_hydra(value)}" for name, value in settings)
        return [f"model.peft.peft_scheme={self.scheme}", *values]

    def check(self) -> None:
        """Have the plugin, or PEFT, check the scheme and its settings at every rank. Imports torch.

        Raises:
            UsageError: an unknown scheme, or what the method's config refuses.
        """
        if self.scheme in STOCK:
            return
        if self.is_peft:
            from benchmark_suite.backends.hf.peft_methods import check

            check(self)
            return
        from nemo_tiedlora.facade import METHODS, OF_YOUR_OWN, config_for

        if self.scheme not in METHODS:
            raise UsageError("scheme", self.scheme, f"{closest(self.scheme, (*METHODS, *STOCK))}; {OF_YOUR_OWN}").under(
                self.name
            )
        for rank in self.ranks:
            try:
                config_for(self.scheme, self.settings_at(rank))
            except UsageError as error:
                raise error.under(f"{self.name}.settings") from None

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "VariantSpec":
        """A spec from plain data, such as a YAML file.

        Raises:
            UsageError: for the first thing that is wrong, under the variant's name.
        """
        name = given.get("name") if isinstance(given, dict) else None
        try:
            return build(cls, given)
        except UsageError as error:
            raise (error.under(name) if isinstance(name, str) and error.field != "name" else error) from None

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data, for JSON and YAML; ``from_dict`` takes it back. Defaults are left out."""
        return plain(self)


def _hydra(value: Any) -> str:
    # Hydra reads a mapping's bare keys only.
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_hydra(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)
