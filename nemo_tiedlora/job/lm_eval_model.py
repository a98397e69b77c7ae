"""lm-evaluation-harness on a NeMo base with an adapter: the model ``nemo_tiedlora``, by the conventions of ``hf``.

tiedlora lm-eval --model nemo_tiedlora --model_args base=base.nemo,adapter=adapter.nemo --tasks piqa
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from nemo_tiedlora.console import progress
from nemo_tiedlora.errors import UsageError, check_choice, closest
from nemo_tiedlora.huggingface.bases import BUILTIN
from nemo_tiedlora.job.generate import generator
from nemo_tiedlora.job.settings import COUNT, PRECISIONS

#: What ``--model_args`` may have; the rest is what lm_eval adds of its own accord.
ARGUMENTS = ("base", "adapter", "batch_size", "max_length", "precision", "add_bos_token", "prefix_token_id")
#: What a task may ask of generation besides its length and its ends.
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")


def main(arguments: list[str]) -> None:
    """Run ``lm_eval ARGUMENTS``, which knows the model ``nemo_tiedlora`` here: it has no plug-ins for models."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


@register_model("nemo_tiedlora")
class NeMoLM(TemplateLM):
    """A base with an adapter or without, in one process, which stays NeMo's host (``platform.host``) to its end.

    Args:
        base: as ``huggingface.bases`` takes it.
        adapter: a ``.nemo`` or a folder.
        batch_size: rows per forward pass; no result depends on it.
        max_length: tokens of context and continuation together; by default the base's.
        precision: 32, bf16 or 16.
        add_bos_token: begin every text with the tokenizer's BOS, or not; by default what the tokenizer does itself.
        prefix_token_id: what a text without context is conditioned on; by default BOS, else EOS.
        device, max_batch_size: lm_eval gives them; NeMo chooses the device itself.

    Raises:
        UsageError: an argument that is not known or makes no sense, or files that do not fit each other.
    """

    def __init__(
        self,
        base: str = BUILTIN,
        adapter: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        precision: str | int = "32",
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        for name, value in unknown.items():
            raise UsageError(f"model_args.{name}", value, closest(name, ARGUMENTS))
        check_choice("model_args.precision", str(precision), PRECISIONS)
        for name, value in {"batch_size": batch_size, "max_length": max_length}.items():
            value = int(value) if str(value).isdigit() else value
            if value is not None and not COUNT[0](value):
                raise UsageError(name, value, f"must be {COUNT[1]}")
        self._stack = ExitStack()
        loaded = generator(str(base), adapter and Path(str(adapter)), precision)
        self.model = self._stack.enter_context(loaded).model
        self.model.eval()
        self.tokenizer = getattr(self.model.tokenizer, "tokenizer", None)
        if not hasattr(self.tokenizer, "convert_ids_to_tokens"):
            self.tokenizer = _Plain(self.model.tokenizer)
        self.batch_size = int(batch_size)
        self.max_length = int(max_length or self.model.cfg.encoder_seq_length)
        self.add_bos_token, self._prefix = add_bos_token, prefix_token_id
        self._device = next(self.model.parameters()).device
        self._names = f"{base} {adapter or ''}".strip()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        known = (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(number for number in known if number is not None)

    @property
    def tokenizer_name(self) -> str:
        return self._names.replace("/", "__").replace(" ", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
                add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **settings)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError("apply_chat_template", self._names, "the base's tokenizer has no chat template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (likelihood, _) in zip(owners, scores, strict=True):
            totals[number] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows = []
        for number, (texts, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UsageError("max_length", self.max_length, f"a continuation has {len(continuation)} tokens")
            rows.append((number, texts, (context + continuation)[-self.max_length - 1 :], len(continuation)))
        rows.sort(key=lambda row: -len(row[2]))  # the longest first: what does not fit is known at once
        for batch in self._batches(rows, "scoring"):
            scored = self._logits([whole[:-1] for _, _, whole, _ in batch], [length for *_, length in batch])
            for (number, texts, whole, length), logits in zip(batch, scored, strict=True):
                answer = torch.tensor(whole[-length:], device=logits.device)
                likely = torch.log_softmax(logits.float(), -1).gather(1, answer[:, None])
                results[number] = likely.sum().item(), bool((logits.argmax(-1) == answer).all())
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[number])
        return results

    def _logits(self, rows: list[list[int]], lengths: list[int]) -> Iterator[torch.Tensor]:
        """The logits (length, vocabulary) of the last ``length`` positions of every row, and of no others: with a
        real vocabulary those of all positions would take more memory than the model."""
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device=self.device)
        for line, row in zip(tokens, rows, strict=True):
            line[: len(row)] = torch.tensor(row)
        asked = [
            (position, number)
            for number, (row, length) in enumerate(zip(rows, lengths, strict=True))
            for position in range(len(row) - length, len(row))
        ]
        where, which = torch.tensor(asked, device=self.device).T

        def only_asked(layer, args):
            hidden, *others = args  # (positions, rows, width)
            return (hidden[where, which][:, None], *others)

        layer = self.model._unwrap_model().output_layer
        hook = layer.register_forward_pre_hook(only_asked)
        try:
            positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
            logits = self.model.model(tokens, positions, None)[0]
        finally:
            hook.remove()
        return iter(logits.split(lengths))

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        results = [""] * len(requests)
        alike: dict[str, list[tuple[int, list[int]]]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append((number, self.tok_encode(request.args[0])))
        for rows in alike.values():
            rows.sort(key=lambda row: -len(row[1]))
            asked = requests[rows[0][0]].args[1]
            settings = normalize_gen_kwargs(asked, 256)
            ends = handle_stop_sequences(settings.pop("until", None), eos=self.tokenizer.decode([self.eot_token_id]))
            tokens = settings.pop("max_gen_toks")
            if tokens >= self.max_length:
                raise UsageError("max_gen_toks", tokens, f"must be less than max_length, which is {self.max_length}")
            for name in settings:
                if name not in SAMPLING:
                    raise UsageError(f"gen_kwargs.{name}", settings[name], closest(name, SAMPLING))
            for batch in self._batches(rows, "answering"):
                contexts = [context[tokens - self.max_length :] for _, context in batch]
                for (number, _), new in zip(batch, self._continued(contexts, tokens, settings), strict=True):
                    text = self.tokenizer.decode(new, skip_special_tokens=True)
                    results[number] = postprocess_generated_text(text, ends, None)
                    self.cache_hook.add_partial("generate_until", requests[number].args, results[number])
        return results

    def _batches(self, rows: Sequence[Any], task: str) -> Iterable[Sequence[Any]]:
        starts = range(0, len(rows), self.batch_size)
        return progress((rows[start : start + self.batch_size] for start in starts), task, len(starts))

    def _continued(self, contexts: list[list[int]], tokens: int, settings: dict[str, Any]) -> Iterator[list[int]]:
        """What follows each context: at most so many tokens, up to the end of the text."""
        padded = torch.full((len(contexts), max(map(len, contexts)) + tokens), self.eot_token_id)
        for line, context in zip(padded, contexts, strict=True):
            line[: len(context)] = torch.tensor(context)
        lengths = torch.tensor([len(context) for context in contexts])
        temperature = settings.get("temperature") or 0.0
        sampling = {
            "use_greedy": temperature == 0,
            "temperature": temperature or 1.0,
            "top_k": settings.get("top_k", 0),
            "top_p": settings.get("top_p", 1.0),
            "repetition_penalty": settings.get("repetition_penalty", 1.0),
            "add_BOS": False,
            "all_probs": False,
            "compute_logprob": False,
            "end_strings": ["<|endoftext|>"],
        }
        inputs = padded.to(self.device), lengths.to(self.device)
        said = self.model.generate(inputs, {"max_length": tokens, "min_length": 0}, sampling)
        for context, ids in zip(contexts, said["token_ids"], strict=True):
            new = ids[len(context) :][:tokens]
            yield new[: [*new, self.eot_token_id].index(self.eot_token_id)]


class _Plain:
    """A tokenizer of NeMo's own, with the names that transformers has for the same."""

    chat_template = None

    def __init__(self, tokenizer):
        self.own = tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self.bos_token_id] * add_special_tokens + self.own.text_to_ids(text)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        special = {self.bos_token_id, self.eos_token_id} if skip_special_tokens else set()
        return self.own.ids_to_text([number for number in ids if number not in special])
