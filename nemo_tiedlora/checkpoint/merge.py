"""An adapter written into its base, and taken out again; one weight in memory at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_tiedlora.checkpoint.adapter import Adapter
from nemo_tiedlora.checkpoint.base import BaseFile, open_base
from nemo_tiedlora.checkpoint.store import read_with_sha256
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.model.config import check_shape, not_of_nemos
from nemo_tiedlora.model.targets import KINDS, rows, where
from nemo_tiedlora.variants import Factors, FrozenWeight, Site, merged

#: Under this name a merged base's config lists what was merged into it, latest last.
RECORD = "merged_adapters"


@dataclass
class Rounding:
    """How much of a base is lost by merging and unmerging in its dtype.

    Args:
        max_difference: largest absolute difference of a weight.
        changed: number of weights that differ.
        weights: number of weights looked at.
    """

    max_difference: float = 0.0
    changed: int = 0
    weights: int = 0

    def note(self, before: Tensor, after: Tensor) -> None:
        difference = (before.double() - after.double()).abs()
        self.max_difference = max(self.max_difference, float(difference.max()))
        self.changed += int(difference.count_nonzero())
        self.weights += before.numel()


class Changes:
    """What an adapter does to each weight of its base."""

    def __init__(self, adapter: Adapter):
        if KINDS in adapter.shape:
            raise not_of_nemos("adapter", adapter.scheme)
        self.adapter = adapter
        self.tensors = {key: tensor.float() for key, tensor in adapter.tensors.items()} | adapter.drawn()
        self.sites: dict[tuple[str, int], list[Site]] = {}
        for site in adapter.sites:
            self.sites.setdefault((where(site.target).path, site.layer), []).append(site)

    def factors(self, site: Site, weight: FrozenWeight) -> Factors:
        """One layer's factors for its frozen weight, in float32."""
        variant = self.adapter.variant
        return variant.factors(
            site, {name: self.tensors[spec.key] for name, spec in variant.tensors(site).items()}, weight
        )

    @torch.no_grad()
    def apply(self, path: str, layer: int, weight: Tensor) -> Tensor:
        """``weight`` (out, in) with the adapter in it: formed in float32, rounded to the weight's dtype."""
        return self._each(path, layer, weight, lambda part, factors: merged(part, factors))

    @torch.no_grad()
    def undo(self, path: str, layer: int, weight: Tensor) -> Tensor:
        """``weight`` (out, in) without the adapter, likewise."""
        return self._each(path, layer, weight, lambda part, factors: merged(part, factors._replace(scale=-factors[2])))

    def _each(self, path: str, layer: int, weight: Tensor, change) -> Tensor:
        precise = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        several = len(self.sites.get((path, layer), ())) > 1
        original = precise.clone() if several and self.adapter.variant.reads_weight else precise
        for site in self.sites.get((path, layer), ()):
            inside = rows(site.target, self.adapter.shape)
            frozen = FrozenWeight(original, inside)
            part = change(frozen(precise.dtype), self.factors(site, frozen))
            if inside is None:
                precise = part
            else:
                precise[inside] = part
        return precise.to(weight.dtype)


def check_trained_on(adapter: Adapter, path: Path, base: BaseFile, force: bool) -> dict[str, str]:
    """The checksums of ``base``, once it is known to be the one that the adapter at ``path`` was trained on.

    Args:
        force: one with other weights will do, if its shape is the same.

    Raises:
        UsageError: it is another one.
    """
    check_shape(adapter.shape, base.config, "adapter", path)
    found = base.checksums(adapter.paths)
    if adapter.base.checksums and found != adapter.base.checksums and not force:
        way_out = "its weights differ; use --force to go on all the same"
        raise UsageError("base", str(base.archive.path), f"not the base this adapter was trained on: {way_out}")
    return found


def said_of(checksums: dict[str, str], adapter: Adapter) -> str:
    """Whether a base's checksums are those of the one that an adapter was trained on, in a word."""
    known = adapter.base.checksums
    return "matches" if checksums == known else "differs" if known else "not recorded"


def merge(base: Path, adapter: Path, out: Path, force: bool = False) -> dict[str, Any]:
    """Write the base with the adapter in its weights: an ordinary ``.nemo`` that gives the adapted model's outputs.

    Args:
        base: ``.nemo`` of the base; one weight of it is in memory at a time.
        adapter: in the canonical form.
        out: the ``.nemo`` to write.
        force: also merge into a base other than the one the adapter was trained on, if its shape is the same.

    Returns:
        What was done. ``unmerge_max_difference`` is how far a weight can be from its first value after ``unmerge``,
        found by trying it on every weight; null if unmerging cannot work.

    Raises:
        UsageError: a base of another shape or, unless forced, with other weights.
    """
    loaded, sha256 = read_with_sha256(adapter)
    with open_base(base, "base", _folder(out)) as source:
        found = check_trained_on(loaded, adapter, source, force)
        changes, rounding = Changes(loaded), Rounding()
        undoable = not loaded.variant.final_at_merge()

        def change(path: str, layer: int, weight: Tensor) -> Tensor:
            after = changes.apply(path, layer, weight)
            if not after.isfinite().all():
                raise UsageError("adapter", str(adapter), f"{path} of layer {layer} would not be finite")
            if undoable:
                rounding.note(weight, changes.undo(path, layer, after))
            return after

        config = source.config.copy()
        record = {"sha256": sha256, "base_checksums": found}
        config[RECORD] = [*(config.get(RECORD) or []), record]
        source.write(out, config, loaded.paths, change)
    return {
        "file": str(out),
        "scheme": loaded.scheme,
        "layers": len(changes.sites),
        "base_checksum": said_of(found, loaded),
        "adapter_sha256": sha256,
        "unmerge_max_difference": rounding.max_difference if undoable else None,
        "unmerge_changed_weights": rounding.changed if undoable else None,
    }


def unmerge(base: Path, adapter: Path, out: Path, force: bool = False) -> dict[str, Any]:
    """Take the adapter that was merged last out of a base again.

    Rounding at merging cannot be undone by arithmetic: the result is compared with the checksum of the first base, and
    ``exact`` says whether it is that base bit by bit.

    Args:
        base: a merged ``.nemo``.
        force: subtract the adapter although the base does not record that it is in it.

    Raises:
        UsageError: another adapter was merged, or one whose change depends on the weights it changed.
    """
    loaded, sha256 = read_with_sha256(adapter)
    why = loaded.variant.final_at_merge()
    if why:
        raise UsageError("adapter", str(adapter), f"cannot be taken out: {why}; use the base itself")
    changes = Changes(loaded)
    with open_base(base, "base", _folder(out)) as source:
        check_shape(loaded.shape, source.config, "adapter", adapter)
        records = source.config.get(RECORD) or []
        record = records[-1] if records else {}
        if record.get("sha256") != sha256 and not force:
            way_out = "another adapter was merged last" if records else "no adapter was merged into it"
            raise UsageError("base", str(base), f"{way_out}; use --force to subtract this one all the same")
        config = source.config.copy()
        if record.get("sha256") == sha256:
            config[RECORD] = records[:-1]
        if not config.get(RECORD):
            config.pop(RECORD, None)
        source.write(out, config, loaded.paths, changes.undo)
    with open_base(out, "out", _folder(out)) as written:
        exact = written.checksums(loaded.paths) == record.get("base_checksums") if record else None
    return {"file": str(out), "scheme": loaded.scheme, "layers": len(changes.sites), "exact": exact}


def _folder(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent
