"""The backend of host ``hf``."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from benchmark_suite.backends.hf import methods
from benchmark_suite.backends.hf.fit import Measured, fit, put_back, trainable
from benchmark_suite.backends.hf.model import ModelFolder
from benchmark_suite.backends.hf.objectives import POSITIONS, Saying, Writing, answer_scores, outputs
from benchmark_suite.backends.hf.rows import Row, groups, ids_of
from benchmark_suite.backends.protocol import TOKENS, Progress, Training
from benchmark_suite.task_spec import TaskSpec
from benchmark_suite.variant_spec import STOCK, VariantSpec
from nemo_tiedlora.facade import UsageError, heads_of

if TYPE_CHECKING:
    from torch import Tensor

#: Prompts that are continued together, at most.
PROMPTS = 64


class HfBackend:
    """See ``protocol.Backend``.

    Args:
        base: the folder of a Hugging Face model.

    Raises:
        UsageError: it is none that is trained here.
    """

    host = "hf"

    def __init__(self, base: str | Path, precision: str = "32"):
        self.folder, self.precision = ModelFolder(base), precision
        self._model: Any = None
        self._outputs: int | None = None  # of its head

    def __enter__(self) -> "HfBackend":
        return self

    def __exit__(self, *exception: object) -> None:
        self._model = None

    @property
    def base(self) -> str:
        return self.folder.path.resolve().name

    @property
    def base_sha256(self) -> str:
        return self.folder.sha256

    def loggers(self) -> Sequence[str]:
        """transformers' own."""
        return ("transformers",)

    def packages(self, variant: VariantSpec) -> Sequence[str]:
        return "transformers", "torch", *(["peft"] if variant.is_peft else [])

    def runs(self, variant: VariantSpec) -> bool:
        """All but what is only in NeMo."""
        return variant.scheme not in STOCK or variant.scheme == "none"

    def has_head(self, task: TaskSpec, wanted: bool | None) -> bool:
        """On encoders always; on decoders if wanted."""
        base, kind = str(self.folder.path), self.folder.kind
        if kind == "encoder" and wanted is False:
            raise UsageError("base", base, "an encoder, which does not write; leave out --text")
        if kind != "encoder" and not wanted:
            return False
        if task.head is None:
            way_out = "it has no head, and so is for models that write: name a decoder's folder, without --head"
            raise UsageError("task", task.id, way_out)
        if not self.folder.takes_head:
            raise UsageError("base", base, "transformers has no class of this model with a head; leave out --head")
        return True

    def check(self, variant: VariantSpec, rank: int | None, head: bool) -> None:
        """Whether a variant fits, found on the model without its weights."""
        try:
            methods.check(self.folder.outline(2 if head else None), variant, rank)
        except UsageError as error:
            raise error.under(variant.name) from None

    def load(self, training: Training) -> None:
        """The model, with the head that the training wants."""
        if self._model is None or self._outputs != training.head:
            self._model = None  # before there are two
            self._model, self._outputs = self.folder.load(training.head, self.precision), training.head

    @contextmanager
    def trained(
        self, training: Training, weights: "Mapping[str, Tensor] | None" = None, progress: Progress | None = None
    ) -> Iterator["HfTrained"]:
        """A loop of torch's; what a method leaves in the model is not trusted, and the model then loaded again."""
        self.load(training)
        model, self._model = self._model, None
        _seed(training.seed)
        for name in heads_of(model):
            model.get_submodule(name).apply(model._init_weights)
        method = methods.put(model, training)
        if weights is None:
            facts, weights = fit(model, method, self._objective(model, training), training, progress)
        else:
            facts = Measured()
        put_back(model, weights)
        model.eval()
        yield HfTrained(model, self.folder, method, facts, training.recipe.max_seq_length)
        if method.take_off():
            self._model = model

    def _objective(self, model: Any, training: Training) -> Writing | Saying:
        kind = Writing if training.head is None else Saying
        return kind(model, self.folder.tokenizer, training, self.folder.context)


class HfTrained:
    """See ``protocol.Trained``; texts for a head are cut to ``longest`` tokens."""

    def __init__(self, model: Any, folder: ModelFolder, method: methods.Full, facts: Measured, longest: int):
        self.model, self.folder, self.method, self.facts = model, folder, method, facts
        self.longest = min(longest, folder.context)

    @property
    def trainable(self) -> "Mapping[str, Tensor]":
        return trainable(self.model)

    @property
    def sizes(self) -> dict[str, Any]:
        return self.method.sizes

    def save(self, folder: Path) -> int:
        """As the method does, in ``adapter``; a model that was trained whole in ``model``."""
        return self.method.save(folder)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """A prompt that leaves no room for the answer in the model's context loses its beginning."""
        tokenizer, room = self.folder.tokenizer, self.folder.context - tokens
        if room < 1:
            raise UsageError("tokens", tokens, f"the base's context has {self.folder.context}")
        ids = [own[-room:] or [tokenizer.eos_token_id] for own in ids_of(tokenizer, prompts)]
        texts: dict[int, str] = {}
        spare = list(range(len(tokenizer), self.folder.text_config.vocab_size))  # rows of no token, which NeMo masks

        def fits(count: int, longest: int) -> bool:
            return count <= PROMPTS and count * (longest + tokens) <= TOKENS

        for group in groups([len(own) for own in ids], fits):
            longest = len(ids[group[-1]])
            lines = torch.full((len(group), longest), tokenizer.pad_token_id)
            mask = torch.zeros_like(lines)
            for line, number in enumerate(group):
                lines[line, longest - len(ids[number]) :] = torch.tensor(ids[number])
                mask[line, longest - len(ids[number]) :] = 1
            said = self.model.generate(
                input_ids=lines.to(self.model.device), attention_mask=mask.to(self.model.device), do_sample=False,
                max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                suppress_tokens=spare or None,
            )[:, longest:]  # fmt: skip
            for number, new in zip(group, said.tolist(), strict=True):
                texts[number] = self._text(new)
        return [texts[number] for number in range(len(prompts))]

    def _text(self, ids: list[int]) -> str:
        tokenizer = self.folder.tokenizer
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """A context that is too long loses its beginning."""
        tokenizer, limit = self.folder.tokenizer, self.folder.context
        wholes = ids_of(tokenizer, [context + continuation for context, continuation in pairs])
        contexts = ids_of(tokenizer, [context for context, _ in pairs])
        rows = [
            Row(whole[-limit:], max(1, len(context) - max(0, len(whole) - limit)))
            for whole, context in zip(wholes, contexts, strict=True)
        ]
        most = max((len(row.ids) - row.start for row in rows), default=0)

        def fits(count: int, longest: int) -> bool:
            return count * longest <= TOKENS and count * most <= POSITIONS

        found: dict[int, tuple[float, bool]] = {}
        for group in groups([len(row.ids) for row in rows], fits):
            scores, answers, counts = answer_scores(self.model, [rows[number] for number in group])
            likely = torch.log_softmax(scores, -1).gather(1, answers[:, None])[:, 0].split(counts)
            greedy = (scores.argmax(-1) == answers).split(counts)
            for number, value, same in zip(group, likely, greedy, strict=True):
                found[number] = float(value.sum()), bool(same.all())
        return [found[number] for number in range(len(pairs))]

    def outputs(self, texts: Sequence[tuple[str, ...]]) -> list[list[float]]:
        """Texts are cut as in training."""
        return outputs(self.model, self.folder.tokenizer, texts, self.longest)


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
