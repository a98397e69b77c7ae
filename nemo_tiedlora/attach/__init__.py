"""A method on any torch model, and what its training asks of the optimizer, which every host uses.

The package is callable: ``nemo_tiedlora.attach(model, ...)`` is ``nemo_tiedlora.attach.attach``, and this is where it
lives.
"""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from nemo_tiedlora.attach.contract import Contract, parameter_groups
from nemo_tiedlora.attach.model import Attached, attach
from nemo_tiedlora.attach.placed import NAME
from nemo_tiedlora.variants import VariantConfig

__all__ = ["Attached", "Contract", "attach", "parameter_groups"]


class _Callable(ModuleType):
    def __call__(
        self,
        model: nn.Module,
        method: str | VariantConfig,
        targets: Sequence[str],
        name: str = NAME,
        **settings: Any,
    ) -> Attached:
        return attach(model, method, targets, name, **settings)


sys.modules[__name__].__class__ = _Callable
