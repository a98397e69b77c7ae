"""A row as the model sees it, with what is learned marked; and the check that every row has something to learn."""

from itertools import groupby

from rich.text import Text

from nemo_tiedlora.errors import UsageError

#: Characters of a stretch of text that are shown.
SHOWN = 400


def check_datasets(model, splits: tuple[str, ...], begun: bool = False) -> list[tuple[str, bool]]:
    """Build every named data section's datasets, and check that each row has something to learn.

    Args:
        begun: the rows were looked at when the run began, and are known to be the same.

    Returns:
        The first training row as stretches of text: (text, is it learned).

    Raises:
        UsageError: a row that does not fit, or that the tokenizer cannot write.
    """
    first = []
    for split in splits:
        section = model.cfg.data.get(split)
        if not section or not section.get("file_names"):
            continue
        datasets = model._build_dataset(section, is_train=split == "train_ds")
        for dataset in getattr(datasets, "datasets", datasets):
            try:
                if not begun:
                    dataset.check_rows()
            except UsageError as error:
                raise (error.under(f"model.data.{split}") if "." not in error.field else error) from None
            if split == "train_ds" and not first:
                row = dataset.row(0)
                first = stretches(model.tokenizer, list(row["input_ids"]), dataset.learned(row))
    return first


def stretches(tokenizer, ids: list[int], learned: list[bool]) -> list[tuple[str, bool]]:
    """A row's tokens as text, cut where learning begins and ends."""
    parts, seen, shown = [], 0, ""
    for is_learned, run in groupby(learned):
        seen += len(list(run))
        text = _text(tokenizer, ids[:seen])  # from the beginning: a token may be a part of a character
        parts.append((text[len(shown) :], is_learned))
        shown = text
    return parts


def marked(parts: list[tuple[str, bool]], in_colour: bool) -> Text:
    """Stretches as one text, what is learned bold and green or, without colour, between « and »."""
    text = Text()
    for part, is_learned in parts:
        if len(part) > SHOWN:
            part = f"{part[: SHOWN // 2]} … {part[-SHOWN // 2 :]}"
        if is_learned:
            text.append(part if in_colour else f"«{part}»", "bold green")
        else:
            text.append(part)
    return text


def _text(tokenizer, ids: list[int]) -> str:
    """Token ids as text, special tokens included."""
    ids = [int(id) for id in ids]
    inner = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "all_special_ids"):  # Hugging Face
        return inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if hasattr(inner, "IsControl"):  # sentencepiece, which leaves such tokens out
        text, plain = "", []
        for id in [*ids, None]:
            if id is not None and not inner.IsControl(id):
                plain.append(id)
                continue
            text += inner.decode_ids(plain) + (inner.id_to_piece(id) if id is not None else "")
            plain = []
        return text
    return tokenizer.ids_to_text(ids)
