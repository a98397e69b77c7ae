"""What adapters cost in training on transformers models, beside Hugging Face PEFT's on the same model in the same run.

    python benchmarks/beside_peft.py

Models are random, of the sizes that are asked for; no data and no weights are needed. Of every step there is

- its time: forward, backward and AdamW, as the time that the processor spends on it, on one thread. All adapters take
  a step in turn, many times over, and a ratio is the median of those of the same turn: what else the machine does
  weighs on both.
- the activations that it keeps for the backward pass: the memory that autograd holds on to, each byte once, as far as
  it grows with the batch.

The copies of the model share their frozen weights.
"""

import json
import platform
import time
from collections.abc import Iterable
from copy import deepcopy
from importlib.metadata import version
from statistics import median, quantiles
from typing import Annotated, Any, NamedTuple
from weakref import WeakSet

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from nemo_tiedlora import huggingface
from nemo_tiedlora.facade import AsJson, UsageError, check_choice

#: Adapters by name: the name of PEFT's that each is compared with, and our scheme with its settings.
OURS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LoRA": ("LoRA", "tied_lora", {"preset": "LoRA"}),
    "VeRA": ("VeRA", "vera", {}),
    "DoRA": ("DoRA", "tied_lora", {"preset": "LoRA", "dora": True}),
    "TL6": ("LoRA", "tied_lora", {"preset": "TL6"}),
    "ShareLoRA": ("LoRA", "share_lora", {}),
    "CondLoRA": ("LoRA", "cond_lora", {}),
    "DynaLoRA": ("LoRA", "dyna_lora", {}),
}
#: Models by name, and by what is adapted, our targets and PEFT's.
TARGETS: dict[str, dict[str, tuple[Any, Any]]] = {
    "llama": {
        "q, v": (["q_proj", "v_proj"],) * 2,
        "qkv": (["attention_qkv"], ["q_proj", "k_proj", "v_proj"]),
        "all linear": ("all-linear",) * 2,
    },
    "roberta": {
        "q, v": (["query", "value"],) * 2,
        "qkv": (["query", "key", "value"],) * 2,
        "all linear": ("all-linear", ["query", "key", "value", "dense"]),
    },
}


class Size(NamedTuple):
    """Of a model, of its input, and of the adapters."""

    hidden: int
    layers: int
    batch: int
    length: int
    rank: int
    vocabulary: int = 1000


class Trained(NamedTuple):
    """An adapted model in training, with its input."""

    model: nn.Module
    ids: torch.Tensor
    optimizer: torch.optim.Optimizer

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def step(self) -> None:
        self.loss(self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def model_of(name: str, size: Size) -> nn.Module:
    """A random one with frozen weights, ready to be trained; no dropout."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": size.vocabulary, "hidden_size": size.hidden, "num_hidden_layers": size.layers}
    common |= {"num_attention_heads": max(1, size.hidden // 64), "max_position_embeddings": size.length + 2}
    if name == "llama":
        config = transformers.LlamaConfig(**common, intermediate_size=8 * size.hidden // 3 // 8 * 8)
        made = transformers.LlamaForCausalLM(config)
    else:
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.RobertaConfig(**common, **no_dropout, intermediate_size=4 * size.hidden)
        made = transformers.RobertaForMaskedLM(config).requires_grad_(False)
    return made.requires_grad_(False).train()


def copied(model: nn.Module) -> nn.Module:
    """With modules of its own and the very same weights."""
    return deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def peft_of(name: str, model: nn.Module, targets: Any, rank: int) -> nn.Module:
    """The model with an adapter of PEFT's."""
    import peft

    common = {"r": rank, "target_modules": targets}
    if name == "VeRA":
        return peft.get_peft_model(model, peft.VeraConfig(**common))
    return peft.get_peft_model(model, peft.LoraConfig(**common, lora_alpha=rank, use_dora=name == "DoRA"))


def all_of(model: str, what: str, size: Size) -> dict[str, Trained]:
    """Every adapter on a copy of the model, by name; those of PEFT begin with ``PEFT``."""
    base, (ours, theirs) = model_of(model, size), TARGETS[model][what]
    ids = torch.randint(3, size.vocabulary, (size.batch, size.length), generator=torch.Generator().manual_seed(0))
    made = {}
    for name in dict.fromkeys(against for against, _, _ in OURS.values()):
        adapted = peft_of(name, copied(base), theirs, size.rank)
        wanted = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        made[f"PEFT {name}"] = Trained(adapted, ids, torch.optim.AdamW(wanted))
    for name, (_, scheme, settings) in OURS.items():
        adapter = huggingface.attach(copied(base), scheme, ours, rank=size.rank, **settings)
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-3))
        adapter.attach_to(optimizer)
        made[name] = Trained(adapter.model, ids, optimizer)
    return made


class Held:
    """A tensor, for as long as autograd holds on to it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def kept_bytes(one: Trained, batch: torch.Tensor) -> int:
    """What a forward pass keeps for the backward pass, without parameters and buffers."""
    kept: WeakSet[Held] = WeakSet()

    def keep(tensor: torch.Tensor) -> Held:
        kept.add(held := Held(tensor.detach()))  # an operation that kept its own output would keep itself for ever
        return held

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        loss = one.loss(batch)
    storages = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage().nbytes() for held in kept}
    del loss  # not before: nothing would be held any more
    for tensor in (*one.model.parameters(), *one.model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def activations(one: Trained) -> tuple[int, int]:
    """Bytes that are kept for the backward pass: those of activations, which grow with the batch, and the others'."""
    once, twice = kept_bytes(one, one.ids), kept_bytes(one, torch.cat([one.ids, one.ids]))
    return twice - once, 2 * once - twice


def seconds(made: dict[str, Trained], rounds: Iterable[int]) -> dict[str, list[float]]:
    """The times of every adapter's steps."""
    for one in made.values():
        one.step()  # some form tensors in their first step
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in rounds:
        for name in made if number % 2 else reversed(made):
            started = time.process_time()
            made[name].step()
            times[name].append(time.process_time() - started)
    return times


def compared(made: dict[str, Trained], rounds: Iterable[int]) -> dict[str, dict[str, float]]:
    """Every adapter of ours beside the one of PEFT's."""
    kept = {name: activations(one) for name, one in made.items()}
    times = seconds(made, rounds)
    found = {}
    for name, (against, _, _) in OURS.items():
        ratios = [ours / theirs for ours, theirs in zip(times[name], times[f"PEFT {against}"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        found[name] = {
            "seconds": median(times[name]),
            "peft_seconds": median(times[f"PEFT {against}"]),
            "time_ratio": median(ratios),
            "time_ratio_quartiles": [low, high],
            "activation_bytes": kept[name][0],
            "peft_activation_bytes": kept[f"PEFT {against}"][0],
            "other_bytes": kept[name][1],
            "peft_other_bytes": kept[f"PEFT {against}"][1],
        }
    return found


def measure(models: list[str], size: Size, rounds: int) -> dict[str, Any]:
    """All of it, with what it was measured on."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "machine": platform.machine(),
        **size._asdict(),
        "rounds": rounds,
        "models": {},
    }
    console = Console(stderr=True)
    for model in models:
        rows = {}
        for what in TARGETS[model]:
            bar = track(range(rounds), f"{model}, {what}", console=console, disable=not console.is_terminal)
            rows[what] = compared(all_of(model, what, size), bar)
        found["models"][model] = {"targets": rows}
    return found


def rows_of(one: dict[str, Any]) -> list[list[str]]:
    """The cells of a model's table."""
    return [
        [name, f"PEFT's {against}"]
        + [f"{rows[name]['time_ratio']:.2f}" for rows in one["targets"].values()]
        + [
            f"{rows[name]['activation_bytes'] / rows[name]['peft_activation_bytes']:.2f}"
            for rows in one["targets"].values()
        ]
        for name, (against, _, _) in OURS.items()
    ]


def columns_of(one: dict[str, Any]) -> list[str]:
    """The heads of its columns."""
    return ["ours", "beside"] + [f"{what}: {part}" for part in ("time", "activations") for what in one["targets"]]


def main(
    model: Annotated[list[str] | None, typer.Option(help="llama or roberta; by default both.")] = None,
    hidden: Annotated[int, typer.Option(min=8)] = 512,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    batch: Annotated[int, typer.Option(help="Rows of the input.", min=1)] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=1)] = 256,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Steps of every adapter; medians count.", min=2)] = 15,
    as_json: AsJson = False,
) -> None:
    """Measure what a training step costs with each adapter, as a share of what it costs with PEFT's."""
    torch.set_num_threads(1)
    size, models = Size(hidden, layers, batch, length, rank), model or list(TARGETS)
    try:
        for name in models:
            check_choice("model", name, TARGETS)
        found = measure(models, size, rounds)
    except UsageError as error:
        raise SystemExit(typer.echo(f"error: {error}", err=True) or 2) from None
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, one in found["models"].items():
        table = Table(*columns_of(one), title=f"{name}: {layers} x {hidden}, {batch * length:,} tokens, rank {rank}")
        for row in rows_of(one):
            table.add_row(*row)
        Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    typer.run(main)
