"""Chat rows as a model sees them: token ids, and which of them are learned.

Rows with ``messages`` are written by the tokenizer's chat template where it has one, else as

    system: You answer with one name.
    user: Who comes before Vera?
    assistant: Ben</s>

with the end-of-text token after every answer. What the assistant says is learned, the end of its turn included. Rows
with ``conversations`` are NeMo's own, and written and masked by NeMo.

A row that is too long loses its oldest exchanges (a question and its answer; the system's text stays), then the
beginning of what is left of the prompt, down to half of ``max_seq_length``, and then the end of its last answer.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from jinja2 import TemplateError
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import (
    PREFIX_STR,
    SYSTEM_TOKEN,
    GPTSFTChatDataset,
)

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.nemo.datasets import JsonRows
from nemo_tiedlora.nemo.rows import MASK, chat_form

Messages = list[dict[str, str]]
#: Token ids of messages; asked for an answer, they end where the assistant's begins.
Encode = Callable[[Messages, bool], list[int]]


class Unwritable(ValueError):
    """A conversation that a tokenizer cannot be given so that answers can be told from prompts."""


class ChatDataset(JsonRows, GPTSFTChatDataset):
    """Chat rows of either form."""

    def _process_example(self, example):
        encode = self._messages if chat_form(example) == "messages" else self._conversation
        room = self.max_seq_length - self.virtual_tokens
        whole, *shorter = _shortened(example)
        try:
            ids, learned = encode(whole)
            needed = self._length(ids, learned)
            if needed > room and shorter:
                fitting = bisect_left(shorter[:-1], True, key=lambda row: self._length(*encode(row)) <= room)
                ids, learned = encode(shorter[fitting])
        except Unwritable as error:
            raise UsageError("model.data.chat", True, f"{self.where(example)}: {error}") from None
        ids, learned = self._cut(ids, learned, room)
        if not any(learned[1:]):
            raise self.too_short(example, needed)
        ids = [self.tokenizer.eos_id] * self.virtual_tokens + ids
        learned = [False] * self.virtual_tokens + learned
        answer = _last_run(learned)
        return {
            "input_ids": torch.tensor(ids),
            "mask": torch.tensor(learned),
            "context_ids": torch.tensor(ids[:answer]),
            "answer_ids": torch.tensor(self._said(ids[answer:])),
            "metadata": {
                name: value
                for name, value in example.items()
                if self.output_original_text or name not in ("messages", "conversations")
            },
        }

    def learned(self, processed: dict) -> list[bool]:
        """Which tokens of a row's ``input_ids`` the loss is computed on."""
        return processed["mask"].tolist()

    def _said(self, answer: list[int]) -> list[int]:
        """An answer to its end: a generated one stops there, and a template may write a line break after it."""
        return answer[: answer.index(self.tokenizer.eos_id) + 1] if self.tokenizer.eos_id in answer else answer

    def _length(self, ids: list[int], learned: list[bool]) -> int:
        """Tokens of a row, with room for an answer to be generated."""
        answer = _last_run(learned)
        return answer + max(len(ids) - answer, self.tokens_to_generate)

    def _cut(self, ids: list[int], learned: list[bool], room: int) -> tuple[list[int], list[bool]]:
        answer = _last_run(learned)
        spare = room - max(len(ids) - answer, self.tokens_to_generate)
        prompt = min(answer, max(0, spare, min(room // 2, room - self.tokens_to_generate)))
        kept = slice(answer - prompt, answer - prompt + room)
        return ids[kept], learned[kept]

    def _messages(self, row: dict) -> tuple[list[int], list[bool]]:
        return learned_of_messages(row["messages"], self.tokenizer, self.add_bos)

    def _conversation(self, row: dict) -> tuple[list[int], list[bool]]:
        row, encode = deepcopy(row), self.tokenizer.text_to_ids
        try:
            processed = super()._process_example(row)  # which puts the turns' marks into them
        except AssertionError as error:
            raise Unwritable(f"NeMo cannot mask it ({error or 'the system text is no unit'}); {_OTHER_MARKS}") from None
        marks, prefix = self.special_tokens, len(encode(PREFIX_STR))
        header = marks["system_turn_start"] + SYSTEM_TOKEN + marks["end_of_name"] + row["system"] + marks["end_of_turn"]
        turns = [encode(PREFIX_STR + turn["value"])[prefix:] for turn in row["conversations"]]
        expected = sum(turns, encode(header))
        ids = processed["input_ids"].tolist()
        if ids[: len(expected)] != expected:
            raise Unwritable(f"the tokenizer joins the end of a turn with the next one; {_OTHER_MARKS}")
        return ids, processed["mask"].tolist()


_OTHER_MARKS = "name marks that it keeps apart in model.data.chat_prompt_tokens, or write the rows as messages"


def _shortened(row: dict) -> Iterator[dict]:
    """The row, then without its first exchange, without its first two, ... down to the last.

    An exchange is a question and its answer; what follows the last answer is left out: nobody learns from it.
    """
    form = chat_form(row)
    turns = row[form]
    if form == "messages":
        learns = [message["role"] == "assistant" for message in turns]
        head = int(turns[0]["role"] == "system")
    else:
        learns = [turn["from"] not in row.get("mask", MASK) for turn in turns]
        head = 0
    end = len(learns) - learns[::-1].index(True)
    later = [index for index in range(head + 1, end) if learns[index - 1] and not learns[index]]
    for start in (head, *later):
        kept = turns[:head] + turns[start:end]
        if form == "messages":
            yield {form: kept}
        else:
            speakers = {turn["from"] for turn in kept}
            mask = [name for name in row.get("mask", MASK).split(",") if name in speakers]
            yield {**row, form: kept, "mask": ",".join(mask)}


def _last_run(learned: list[bool]) -> int:
    """Where the last unbroken run of learned tokens begins; the length where there is none."""
    end = len(learned)
    while end and not learned[end - 1]:
        end -= 1
    while end and learned[end - 1]:
        end -= 1
    return end if any(learned) else len(learned)


def learned_of_messages(messages: Messages, tokenizer, add_bos: bool = False) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant says.

    Args:
        tokenizer: one of NeMo's. add_bos: begin with that token, where the tokenizer has no chat template.

    Raises:
        Unwritable: the chat template cannot write this conversation, or not so that each answer can be told apart.
    """
    messages = [{name: message[name] for name in ("role", "content")} for message in messages]
    template = template_of(tokenizer)
    try:
        if template and re.search(r"{%-?\s*generation\s*-?%}", template):
            written = tokenizer.tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            if not any(written["assistant_masks"]):
                raise Unwritable("the tokenizer's chat template marks nothing of it as generated")
            return written["input_ids"], [bool(said) for said in written["assistant_masks"]]
        encode = _by_template(tokenizer) if template else _plainly(tokenizer, add_bos)
        ids = encode(messages, False)
        learned = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, answered = encode(messages[:number], True), encode(messages[: number + 1], False)
                if ids[: len(answered)] != answered or answered[: len(prompt)] != prompt:
                    why = (
                        "the tokenizer writes a turn otherwise once others follow, so that answers cannot be told from"
                    )
                    raise Unwritable(f"{why} prompts; put generation marks into its chat template")
                learned[len(prompt) : len(answered)] = [True] * (len(answered) - len(prompt))
    except TemplateError as error:
        raise Unwritable(f"the tokenizer's chat template refuses it ({error})") from None
    return ids, learned


def template_of(tokenizer) -> str | None:
    """The chat template of a Hugging Face tokenizer inside NeMo's, if it has one."""
    template = getattr(getattr(tokenizer, "tokenizer", None), "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _by_template(tokenizer) -> Encode:
    return lambda messages, ask: tokenizer.tokenizer.apply_chat_template(messages, add_generation_prompt=ask)


def _plainly(tokenizer, add_bos: bool) -> Encode:
    """``role: content``, a turn to a line; what follows an answer is encoded by itself, after the end-of-text token."""

    def encode(messages: Messages, ask: bool) -> list[int]:
        ids, text = [tokenizer.bos_id] if add_bos else [], ""
        for message in messages:
            text += f"{message['role']}: {message['content'].strip()}"
            if message["role"] == "assistant":
                ids += [*tokenizer.text_to_ids(text), tokenizer.eos_id]
                text = ""
            else:
                text += "\n"
        return ids + tokenizer.text_to_ids(text + "assistant:" if ask else text)

    return encode
