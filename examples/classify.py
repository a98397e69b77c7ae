"""Fine-tune an encoder that transformers saved to tell texts apart, with an adapter of any method; NeMo is not needed.

    python examples/classify.py --base MODEL_DIR --train train.jsonl --validation validation.jsonl \\
        --text premise --text hypothesis --out adapter

Rows are JSON objects with one or two texts and a whole number from 0 as the label. The head that is trained beside the
adapter is new. With dyna_lora there is also a log of which modules were trained when, for tiedlora analyze allocation.
"""

import json
import random
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track

from nemo_tiedlora import huggingface
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import check_output, write_text


def rows_of(path: Path, text: list[str], label: str) -> list[tuple[list[str], int]]:
    """Every row's texts and its label."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [([row[name] for name in text], int(row[label])) for row in map(json.loads, lines)]
    except OSError as error:
        raise UsageError("data", str(path), f"cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError("data", str(path), f"not rows with {', '.join(text)} and {label} ({error!r})") from None


def settings_of(text: str) -> dict:
    """Settings from JSON."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise UsageError("settings", text, 'not names and values as JSON, such as {"preset": "LoRA"}') from None


def loaded(base: str, labels: int):
    """The tokenizer and the model, ready to be trained, with a new head for so many labels."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    except (OSError, ValueError) as error:
        raise UsageError("base", base, f"transformers cannot load it ({error})") from None
    return tokenizer, model.train()


def batches(rows, tokenizer, size: int, length: int):
    """Inputs and labels, padded to the longest of each batch."""
    for start in range(0, len(rows), size):
        texts, labels = zip(*rows[start : start + size], strict=True)
        inputs = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=length, padding=True,
                           return_tensors="pt")  # fmt: skip
        yield inputs, torch.tensor(labels)


@torch.no_grad()
def accuracy(model, rows, tokenizer, size: int, length: int) -> float:
    """The share of rows whose label is the likeliest."""
    model.eval()
    right = sum((model(**inputs).logits.argmax(1) == labels).sum().item()
                for inputs, labels in batches(rows, tokenizer, size, length))  # fmt: skip
    model.train()
    return right / len(rows)


def main(
    base: Annotated[str, typer.Option(help="Folder of the model.")],
    train: Annotated[Path, typer.Option(help="JSONL.")],
    validation: Annotated[Path, typer.Option(help="JSONL.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    text: Annotated[list[str], typer.Option(help="Field with a text; once or twice.")],
    label: Annotated[str, typer.Option(help="Field with the label.")] = "label",
    scheme: Annotated[str, typer.Option(help="Method; tiedlora methods lists them.")] = "tied_lora",
    settings: Annotated[str, typer.Option(help="Of the method, as JSON.")] = '{"preset": "LoRA"}',
    targets: Annotated[str, typer.Option(help="Layers to adapt, separated by commas.")] = "query,value",
    rank: Annotated[int, typer.Option(min=1)] = 8,
    epochs: Annotated[int, typer.Option(help="0: the adapter is saved as it starts.", min=0)] = 5,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a row that are used.", min=2)] = 128,
    lr: Annotated[float, typer.Option(help="At the start; it falls linearly to 0.")] = 5e-4,
    seed: int = 0,
) -> None:
    """Train, save, and print how many rows of the validation file are told right."""
    console = Console(stderr=True)
    try:
        check_output(out, "out")
        learned, held_out = (rows_of(path, text, label) for path in (train, validation))
        random.seed(seed)
        torch.manual_seed(seed)
        labels = 1 + max(number for _, number in learned + held_out)
        tokenizer, model = loaded(base, labels)
        adapter = huggingface.attach(model, scheme, targets.split(","), rank=rank, **settings_of(settings))
        console.print(str(adapter))
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr), weight_decay=0.01)
        adapter.attach_to(optimizer)
        steps = epochs * -(-len(learned) // batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
        bar = track(range(epochs), "training", console=console, disable=not console.is_terminal)
        for _ in bar:
            random.shuffle(learned)
            for inputs, numbers in batches(learned, tokenizer, batch, length):
                model(**inputs, labels=numbers).loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        found = accuracy(model, held_out, tokenizer, batch, length)
        adapter.save(out)
        if history := adapter.variant.history():
            write_text(out / "allocations.json", json.dumps(history, indent=1) + "\n")
    except UsageError as error:
        raise SystemExit(typer.echo(f"error: {error}", err=True) or 2) from None
    facts = {"accuracy": round(found, 4), "rows": len(learned), "epochs": epochs, "steps": steps, "out": str(out)}
    print(json.dumps(facts))


if __name__ == "__main__":
    typer.run(main)
