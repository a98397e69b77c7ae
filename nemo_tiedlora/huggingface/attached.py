"""Adapters on transformers models, without NeMo: attached, trained, kept in the canonical file, merged, exported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nemo_tiedlora.attach import Attached, quantised
from nemo_tiedlora.attach.placed import NAME, is_spread
from nemo_tiedlora.attach.together import adapters_on, joined
from nemo_tiedlora.checkpoint import Adapter, Base, read, write
from nemo_tiedlora.checkpoint.adapter import paths_of, settings_of
from nemo_tiedlora.checkpoint.plain_lora import PlainLora
from nemo_tiedlora.errors import UsageError, check_choice
from nemo_tiedlora.files import new_folder
from nemo_tiedlora.huggingface import card, heads, peft_lora
from nemo_tiedlora.huggingface.export import DTYPES
from nemo_tiedlora.huggingface.families import FAMILIES
from nemo_tiedlora.huggingface.held import HeldBase, checksums_of
from nemo_tiedlora.huggingface.placing import Found, Known, again, found
from nemo_tiedlora.model.config import check_shape
from nemo_tiedlora.model.data import ModelConfig
from nemo_tiedlora.model.targets import KINDS
from nemo_tiedlora.variants import VariantConfig, config_for, count

if TYPE_CHECKING:
    import transformers


class AttachedToTransformers(Attached):
    """An adapter on a transformers model; see ``Attached`` for how it is trained and how it leaves.

    ``print(adapter)`` says what is adapted and how many parameters are trained.
    """

    def __init__(
        self,
        model: nn.Module,
        config: VariantConfig,
        found: Found,
        whole: list[str],
        stored: Collection[str] = (),
        name: str = NAME,
    ):
        self.known, self.layers, self._whole = found.known, found.layers, whole
        super().__init__(model, config, found.places, found.layers, stored, name)

    def _prepare(self) -> None:
        there = adapters_on(self.model)
        for other in there.values() if there else ():
            whole = tuple(f"{name}." for name in other.whole_modules())
            for name in (span.name for placed in self.placed for span in placed.place.spans):
                if f"{name}.".startswith(whole):
                    raise UsageError(
                        "targets", name, f"the adapter {other.name} trains it whole; leave one of them out"
                    )
        with there.disabled() if there else nullcontext():  # they start as the model's own, not as another adapter's
            #: What it trains whole.
            self.heads = heads.Heads(self.model, self._whole)

    def _switch(self, on: bool) -> None:
        super()._switch(on)
        self.heads.switch(on)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, each once."""
        return super().parameters() + self.heads.parameters()

    def _in_place(self) -> bool:
        return super()._in_place() and self.heads.in_place()

    def whole_modules(self) -> list[str]:
        """Names of the modules that are trained whole."""
        return self.heads.names

    def _keep_whole_modules(self) -> None:
        for parameter in self.heads.parameters():
            parameter.requires_grad_(True)

    def parameter_groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """As ``Attached``'s, and the parameters of the modules that are trained whole in a group of their own."""
        groups = super().parameter_groups(lr)
        if self.heads.names:
            groups.append({"params": self.heads.parameters()} | ({} if lr is None else {"lr": lr}))
        return groups

    def __str__(self) -> str:
        sites = [placed.place.site for placed in self.placed]
        kinds = Counter((site.target, site.out_features, site.in_features) for site in sites)
        trained, whole = count(self.variant, sites).trainable, sum(p.numel() for p in self.model.parameters())
        lines = [f"{self.variant.config.scheme}, rank {self.variant.rank}: {trained:,} trained parameters"]
        lines[0] += f", {100 * trained / whole:.3g} % of the model's"
        for (target, rows, columns), layers in kinds.items():
            lines.append(f"  {target} ({rows} x {columns}) in {layers} layer{'s' if layers > 1 else ''}")
        if self.known is None and len(kinds) > 1:
            lines.append("  layers of different kinds or shapes share no tensors")
        if self.heads.names:
            trained = sum(parameter.numel() for parameter in self.heads.parameters())
            lines.append(f"  {', '.join(self.heads.names)}: trained whole, {trained:,} parameters more")
        return "\n".join(lines)

    def callback(self) -> transformers.TrainerCallback:
        """What ``transformers.Trainer`` needs in ``callbacks``, so that its optimizer's steps are the method's."""
        from nemo_tiedlora.huggingface.trainer import callback_for

        return callback_for(self)

    def adapter(self) -> Adapter:
        """The adapter as a value, with the checksums of the model's weights: what ``save`` writes.

        Raises:
            UsageError: the adapter is merged.
        """
        if self._merged:
            raise UsageError("adapter", self.variant.config.scheme, "is merged; save it before, or unmerge() first")
        config, known, places = self.variant.config, self.known, [placed.place for placed in self.placed]
        if known:
            base = Base.of(known.shape, HeldBase(self.model, known).checksums(paths_of(config, known.shape)))
        else:
            base = Base.of_sites([place.site for place in places], self.layers, checksums_of(places))
        tensors = {key: tensor.detach().cpu() for key, tensor in self.bank.kept(config.store_frozen).items()}
        return Adapter(config.scheme, settings_of(config, self.variant, self.bank.checksums), base, tensors)

    def save(self, path: str | Path, base_name: str | None = None) -> str:
        """Write the adapter in the canonical form, which NeMo's side reads too where it runs such models.

        Heads that are trained whole are beside it, in ``heads.safetensors``. Of a model that ``fully_shard`` has spread
        over processes, all of them call it, and the first one writes. A folder is ready for the Hub: a page about the
        adapter, ``README.md``, is in it too, unless there is one of your own.

        Args:
            path: a folder; of a model that NeMo runs, also a file that ends in ``.nemo``.
            base_name: what the page calls the model; None: what it was loaded by, if that is a name on the Hub.

        Returns:
            The adapter's SHA-256.

        Raises:
            UsageError: see ``adapter``; or the disk is full.
        """
        if Path(path).suffix == ".nemo" and (self.heads.names or not self.known):
            way_out = f"name a folder: NeMo does not run a {type(self.model).__name__}"
            raise UsageError("path", str(path), way_out)
        made = self.adapter()
        if is_spread(self.model) and torch.distributed.get_rank():
            with TemporaryDirectory() as folder:
                return write(made, folder)  # the first process writes
        sha256 = write(made, path)
        if Path(path).suffix != ".nemo":
            heads.write(self.model, self.heads, Path(path))
            card.write(Path(path), made, sha256, self.model, base_name, self.heads)
        return sha256

    def export_peft(self, folder: str | Path, dtype: str = "float32", base_name: str | None = None) -> dict[str, Any]:
        """Write the adapter as plain LoRA of Hugging Face PEFT, which computes the same.

        Args:
            folder: new or empty. dtype: of the tensors, one of ``DTYPES``.
            base_name: what PEFT is told of the model's name; None: what it was loaded by, if that is a name on the Hub.

        Returns:
            The numbers of parameters and of modules, and the rank.

        Raises:
            UsageError: a model of another family than ``FAMILIES``; see ``adapter``; values too large for the dtype; or
                there is something in the folder.
        """
        check_choice("dtype", dtype, DTYPES)
        known = self._family("export_peft")
        base_name = card.name_of(self.model, base_name)
        lora = PlainLora(self.adapter(), HeldBase(self.model, known))
        with new_folder(Path(folder), "folder") as unfinished:
            facts = peft_lora.write(lora, known.modules, unfinished, getattr(torch, dtype), base_name)
            card.write_exported(unfinished, lora.adapter, base_name, facts)
        return facts

    def _family(self, what: str) -> Known:
        if self.known is None:
            way_out = f"{what} knows the files of {', '.join(FAMILIES)}; merge() it and save the model instead"
            raise UsageError("model", type(self.model).__name__, way_out)
        return self.known


def attach(
    model: nn.Module,
    scheme: str = "tied_lora",
    targets: Sequence[str] | str = "all-linear",
    name: str = NAME,
    modules_to_save: Sequence[str] | None = None,
    **settings: Any,
) -> AttachedToTransformers:
    """Adapt linear layers of a transformers model, in place; freeze everything else but the heads of a task.

    An adapter beside others becomes the only active one; ``adapter.adapters`` switches between them and mixes them.

    Args:
        model: as ``from_pretrained`` gives it.
        scheme: name of the method.
        targets: what to adapt: names of modules or how they end (``q_proj``, ``attention.self.query``), with ``*`` and
            ``?``; regular expressions of whole names; ``all-linear``; on the families that NeMo runs also NeMo's words:
            ``attention_qkv`` is one adapter of all rows of q, k and v, ``attention_q`` one of q's, and so on.
        name: what to call it beside other adapters on the model.
        modules_to_save: names of modules, or how they end, that the adapter has trained copies of; None: the heads.
        settings: of the method, e.g. ``rank=8, preset="TL6"``.

    Returns:
        The adapter on the model.

    Raises:
        UsageError: an unknown method, setting, target or module, with the closest name; a rank that does not fit; or a
            model that has an adapter of this name already. Then the model is as it was.
    """
    config = config_for(scheme, settings)
    joined(model, name)
    whole = heads.named(model, modules_to_save)
    where = found(model, targets, config, whole)
    return AttachedToTransformers(model, replace(config, target_modules=where.targets), where, whole, name=name)


def load(model: nn.Module, path: str | Path, force: bool = False, name: str = NAME) -> AttachedToTransformers:
    """Attach the adapter at ``path``, which was trained here or by NeMo on the base that is made of this model.

    Args:
        path: a folder or a ``.nemo`` in the canonical form.
        force: also on other weights, if the shape is the same.
        name: what to call it beside other adapters on the model.

    Raises:
        UsageError: a file that is damaged, or one for another base. Then the model is as it was.
    """
    joined(model, name)
    loaded, path = read(path), Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    whole, saved = heads.read(model, folder)
    config = loaded.config
    if KINDS in loaded.shape:
        where = again(model, loaded.sites, config.target_modules, loaded.base.shape["num_layers"], whole)
        known = None
    else:
        where = found(model, config.target_modules, config, whole)
        known = where.known
        assert known is not None  # or the words were refused
        check_shape(loaded.shape, ModelConfig(Base.of(known.shape).shape), "adapter", path)
    heads.check(model, whole, saved, folder)
    if loaded.base.checksums and not force:
        here = HeldBase(model, known).checksums(loaded.paths) if known else checksums_of(where.places)
    else:
        here = loaded.base.checksums
    if here != loaded.base.checksums:
        linear = where.places[0].spans[0].linear
        dtype = quantised.kind(linear) or str(linear.weight.dtype).removeprefix("torch.")
        way_out = f"its weights, in {dtype} here, are not those that the adapter was trained on; load the model that "
        way_out += "was, in the dtype that it was saved in, or go on all the same with force=True"
        raise UsageError("model", type(model).__name__, way_out)
    attached = AttachedToTransformers(model, config, where, whole, loaded.tensors.keys(), name)
    with torch.no_grad():
        for key, tensor in attached.named_tensors().items():
            if key in loaded.tensors:
                tensor.copy_(loaded.tensors[key])
        for key, tensor in saved.items():
            attached.heads.tensors[key].copy_(tensor)
    return attached
