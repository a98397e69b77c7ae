"""A sentencepiece model as a ``tokenizer.json``, where that does the same; its format is read here.

``sentencepiece`` computes with such a file, but says only a part of what is in it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from nemo_tiedlora.model.tokenizer import settings_of

MODEL = "tokenizer.model"
SPACE = "▁"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


class Pieces(NamedTuple):
    """What a sentencepiece model says: pieces with scores and types, and how text is normalised."""

    pieces: list[tuple[str, float, int]]
    kind: int
    bytes: bool
    special: dict[str, int]
    map: bytes
    prefix: bool
    shrink: bool


def read(content: bytes) -> Pieces:
    """The content of a sentencepiece model.

    Raises:
        ValueError: it is damaged.
    """
    fields = list(_fields(content))
    pieces = []
    for number, value in fields:
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
    if not any(kind == UNKNOWN for *_, kind in pieces):
        raise ValueError("not a sentencepiece model")
    trainer = dict(_fields(next((value for number, value in fields if number == 2), b"")))
    normalizer = dict(_fields(next((value for number, value in fields if number == 3), b"")))
    defaults = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
    special = {name: trainer.get(number, default) for name, (number, default) in defaults.items()}
    return Pieces(
        pieces,
        trainer.get(3, UNIGRAM),
        bool(trainer.get(35, 0)),
        {name: number for name, number in special.items() if 0 <= number < len(pieces)},
        normalizer.get(2, b""),
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message in the format of protocol buffers: whole numbers as such, everything else as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(content) or shift > 63:
                raise ValueError("cut off")
            byte = content[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(content):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value = varint()
            yield number, value - 2**64 if value >= 2**63 else value
            continue
        if kind not in (1, 2, 5):
            raise ValueError("not a sentencepiece model")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        if size > len(content) - at:
            raise ValueError("cut off")
        yield number, content[at : at + size]
        at += size


def converted(content: bytes) -> tuple[bytes | None, dict[str, Any]]:
    """``tokenizer.json`` and its settings; None and what ``config.json`` says, if transformers' tokenizers differ.

    Raises:
        ValueError: it is damaged.
    """
    import sentencepiece

    model = read(content)
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    names = {name: model.pieces[number][0] for name, number in model.special.items()}
    settings = settings_of({**names, "clean_up_tokenization_spaces": False})
    facts = {f"{name}_id": number for name, number in model.special.items() if name != "unk_token"}
    facts["vocab_size"] = len(model.pieces)
    if model.kind not in (UNIGRAM, BPE):
        return None, facts
    made = _made(model)
    for text in _texts(model):
        ids = made.encode(text, add_special_tokens=False).ids
        if ids != reference.encode(text):
            return None, facts
        unknown = model.special.get("unk_token") in ids  # which is written in a way of its own
        if not unknown and made.decode(ids) != reference.decode(ids):
            return None, facts
    return made.to_str().encode(), settings


def _made(model: Pieces) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    numbers = {piece: number for number, (piece, _, _) in enumerate(model.pieces)}
    unknown = next(piece for piece, _, kind in model.pieces if kind == UNKNOWN)
    own = [piece for piece, _, kind in model.pieces if kind == USER_DEFINED]
    if model.kind == UNIGRAM:
        scores = [(piece, score) for piece, score, _ in model.pieces]
        made = Tokenizer(models.Unigram(scores, unk_id=numbers[unknown], byte_fallback=model.bytes))
    else:
        merges = _merges(model)
        whole = any(len(piece) > 1 for piece in own)
        made = Tokenizer(models.BPE(
            numbers, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.bytes, ignore_merges=whole
        ))  # fmt: skip
    steps = [normalizers.Precompiled(model.map)] if model.map else []
    if model.shrink:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if model.prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if own:  # they are found first, and nothing is merged across them
        pattern = "|".join(re.escape(piece) for piece in sorted(own, key=len, reverse=True))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    end = [decoders.Strip(" ", left=1)] if model.prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    made.add_special_tokens([AddedToken(piece, special=True) for piece, _, kind in model.pieces if kind == CONTROL])
    return made


def _merges(model: Pieces) -> list[tuple[str, str]]:
    """Of every piece, the ways to make it of two others; those of the best piece come first."""
    numbers = {piece: number for number, (piece, _, kind) in enumerate(model.pieces) if kind == NORMAL}
    found = []
    for piece, score, kind in model.pieces:
        if kind != NORMAL:
            continue
        ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in ways if left in numbers and right in numbers]
        found += [(-score, numbers[left], numbers[right], (left, right)) for left, right in known]
    return [pair for *_, pair in sorted(found)]


def _texts(model: Pieces) -> Iterator[str]:
    """Texts on which both must agree."""
    yield from (
        "a",
        "hello world",
        " two  spaces ",
        "line\nline\n\n\tend\n",
        "What is 3 + 45? It's 48.",
        "Ünï cödé 世界 🙂",
    )
    yield from ("\n", "\nat the beginning", "the end ", "a-b_c/d\\e (f) [g] {h}: 'i', \"j\"; k=l*m", "x" * 30)
    plain = [piece.replace(SPACE, " ") for piece, _, kind in model.pieces if kind in (NORMAL, USER_DEFINED)]
    for start in range(0, len(plain), 16):
        yield "".join(plain[start : start + 16])
