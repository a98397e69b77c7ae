"""What the analyses ask of a base, whichever host runs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from nemo_tiedlora.model.sizes import Sizes
from nemo_tiedlora.variants import Factors, FrozenWeight, SharedConfig, Site


class AdaptedLayer(NamedTuple):
    """A layer's factors and its frozen weight."""

    factors: Factors
    weight: FrozenWeight


class AnalysedBase(Protocol):
    """A base that a user has named. Its weights are read when something needs them.

    Attributes:
        targets: what adapters go on by default.
    """

    targets: list[str]

    def sizes(self, config: SharedConfig) -> Sizes:
        """Of an adapter with these settings.

        Raises:
            UsageError: targets that the model does not have, or settings that do not fit.
        """

    def similarity(self, texts: Sequence[str], length: int, kind: str) -> list[list[float]]:
        """How similar the layers' outputs at the last token of ``texts`` are: layers × layers.

        Args:
            length: tokens of a text that are used, at most.
            kind: ``angular`` or ``cosine``.
        """

    def check(self, adapter: Path, field: str) -> None:
        """Raise ``UsageError``, about ``field``, unless ``adapter`` is of one of our methods and fits the base."""

    def adapted(self, adapter: Path) -> dict[Site, AdaptedLayer]:
        """Every adapted layer, in the order of targets and layers; the base stays in memory as long as one of them.

        Raises:
            UsageError: an adapter with NaN or infinity in it.
        """

    def sha256(self) -> str:
        """Of the base's file, or of its files of weights."""
