"""What `make demo` runs: the fine-tuning script, on a base of the user's choice.

    python tools/demo.py                              # the built-in base learns its own task
    python tools/demo.py BASE=smollm2                 # a real language model learns to answer letters as a shop does
    python tools/demo.py BASE=smollm2 DATA=my.jsonl   # it learns the user's own rows

With a base or a file of rows, the number of steps follows from the rows' length, so that a small language model takes a
few minutes on two cores.
"""

import json
import sys
from itertools import islice, product
from pathlib import Path
from random import Random

from nemo_tiedlora import scripts
from nemo_tiedlora.errors import UsageError, closest
from nemo_tiedlora.files import write_text
from nemo_tiedlora.nemo.rows import read_rows

FOLDER = Path("nemo_experiments") / "demo"
#: Characters of all rows of all steps together, and of a token.
CHARACTERS, LETTERS = 100_000, 3
BATCH, LONGEST, MOST_ROWS, MOST_STEPS = 8, 256, 5000, 30
TRAIN, VALIDATION = 240, 16

NAMES = "Anna Ben Carl Dora Emma Fred Greta Hugo Ida Jack Kate Leo Mary Nora Otto Paul Rose Sam Tom Vera".split()
COLOURS = "blue green red white black yellow grey brown".split()
THINGS = "mug lamp chair clock basket blanket teapot mirror stool vase kettle rug".split()
#: What customers write, and what the house answers.
LETTERS_AND_ANSWERS = (
    ("Hello, this is {name}. Where is my {thing}?", "the {thing} is on its way."),
    ("My {thing} arrived broken today. {name}", "a new {thing} goes out today."),
    ("Please cancel the {thing}, I changed my mind. {name}", "the {thing} is cancelled."),
    ("I am {name}, and I love the {thing} you sent me!", "enjoy the {thing}."),
)
TASK, ANSWER = "You answer letters to a shop.", "Dear {name}, {said} Yours, Tilda"


def letters() -> dict[str, list[dict]]:
    """The rows of every split: about another customer or another thing each."""
    draw = Random(0)
    facts = list(product(NAMES, COLOURS, THINGS))
    draw.shuffle(facts)
    rows = []
    for name, colour, thing in facts[: TRAIN + VALIDATION]:
        letter, said = draw.choice(LETTERS_AND_ANSWERS)
        said = ANSWER.format(name=name, said=said.format(thing=f"{colour} {thing}"))
        rows.append(chat(letter.format(name=name, thing=f"{colour} {thing}"), said, TASK))
    return {"train": rows[:TRAIN], "validation": rows[TRAIN:]}


def own_rows(path: Path) -> dict[str, list[dict]]:
    """The rows of a user's file as conversations, every tenth of them for validation."""
    rows = []
    for number, row in islice(read_rows(path, "DATA"), MOST_ROWS):
        if "messages" not in row and "conversations" not in row:
            texts = [value for value in row.values() if isinstance(value, str)]
            if len(texts) < 2:
                way_out = f"line {number} has neither messages nor two texts, of which the last is learned"
                raise UsageError("DATA", str(path), way_out)
            row = chat("\n".join(texts[:-1]), texts[-1])
        rows.append(row)
    if len(rows) < 2:
        raise UsageError("DATA", str(path), "too short: two rows at least, one of which is not trained on")
    train = [row for number, row in enumerate(rows) if number % 10]
    return {"train": train, "validation": rows[::10][:VALIDATION]}


def chat(asked: str, answered: str, task: str | None = None) -> dict[str, list[dict[str, str]]]:
    """A row of two turns, after what the model is told to do."""
    turns = [("system", task)] if task else []
    turns += [("user", asked), ("assistant", answered)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def settings(base: str | None, data: str | None) -> list[str]:
    """What the fine-tuning script is told."""
    chosen = ["model.peft.peft_scheme=tied_lora", *([f"model.restore_from_path={base}"] if base else [])]
    if not data and base in (None, "builtin"):
        return chosen
    rows = own_rows(Path(data)) if data else letters()
    for split, content in rows.items():
        write_text(FOLDER / f"{split}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
        chosen.append(f"model.data.{split}_ds.file_names=[{FOLDER / split}.jsonl]")
    length = sum(min(len(json.dumps(row)), LONGEST * LETTERS) for row in rows["train"]) / len(rows["train"])
    steps = max(10, min(MOST_STEPS, int(CHARACTERS / (BATCH * length))))
    batch = min(BATCH, len(rows["train"]))
    return [
        *chosen,
        "model.data.chat=true",
        f"model.data.train_ds.max_seq_length={LONGEST}",
        "model.data.validation_ds.tokens_to_generate=32",
        f"model.data.validation_ds.metric.name={'loss' if data else 'exact_string_match'}",
        f"model.global_batch_size={batch}",
        f"model.micro_batch_size={batch}",
        "model.peft.tied_lora_tuning.target_modules=[all]",
        "model.peft.tied_lora_tuning.init_scheme=zero_delta",
        "model.optim.lr=1e-2",
        "model.optim.sched.warmup_steps=5",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}",
        "trainer.precision=bf16",
    ]


def main() -> None:
    """Read ``NAME=value`` and run the script."""
    given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    for name in given:
        if name not in ("BASE", "DATA"):
            raise UsageError("argument", name, closest(name, ("BASE", "DATA")))
    chosen = settings(given.get("BASE") or None, given.get("DATA") or None)
    scripts.run("megatron_gpt_finetuning.py", "make demo", chosen)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
