"""What DynaLoRA's inactive modules save: weight-gradient arithmetic, kept activations and time of a training step.

Every row is measured in this run, on a stack of linear layers with the adapter in question, and compared with the first
row, where all modules train. Needs no data and no base model.
"""

import time

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nemo_tiedlora import attach
from nemo_tiedlora.errors import UsageError


def measure(active: int, inner: str, layers: int, width: int, tokens: int, rank: int, steps: int) -> dict[str, float]:
    """One setting.

    Returns:
        ``flops`` of weight gradients in the backward pass; ``kept_bytes`` of tensors that the forward pass keeps for
        it; ``seconds`` of a step, in the median.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(*(nn.Sequential() for _ in range(layers))).to(device)
    for layer in model:
        layer.append(nn.Linear(width, width, device=device))
    settings = {"inner": inner, "active": active, "rank": rank, "allocator": "random", "period": 10**9}
    adapter = attach(model, "dyna_lora", ["0"], **settings)
    adapter.attach_to(torch.optim.SGD(adapter.parameter_groups(lr=0.0)))
    x = torch.randn(tokens, width, device=device, requires_grad=True)  # as after a layer below
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = model(x)
    parameters = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    distinct = {tensor.data_ptr(): tensor.nbytes for tensor in kept if tensor.data_ptr() not in parameters}
    flops = backward_flops(y)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        model(x).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    model.requires_grad_(False)
    return {
        "flops": flops - backward_flops(model(x)),  # what is left without trained tensors are gradients of activations
        "kept_bytes": sum(distinct.values()),
        "seconds": sorted(times)[len(times) // 2],
    }


def backward_flops(y: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    return counter.get_total_flops()


def main(
    inner: str = typer.Option("lora", help="lora, vera, tied_lora, share_lora or cond_lora."),
    layers: int = typer.Option(12, help="Modules, of which some are active.", min=3),
    width: int = typer.Option(768, min=1),
    tokens: int = typer.Option(1024, help="Rows of the input.", min=1),
    rank: int = typer.Option(64, min=1),
    steps: int = typer.Option(7, help="Timed steps; the median counts.", min=1),
) -> None:
    """Measure what inactive modules save."""
    console = Console(soft_wrap=True)
    counts = [layers, 2 * layers // 3, layers // 3, 1]
    shown = track(counts, "measuring", console=Console(stderr=True), disable=not console.is_terminal)
    try:
        rows = {active: measure(active, inner, layers, width, tokens, rank, steps) for active in shown}
    except UsageError as error:
        raise SystemExit(typer.echo(f"error: {error}", err=True) or 2) from None
    table = Table("active modules", "weight-gradient FLOPs", "kept activations", "step time")
    whole = rows[layers]
    for active, row in rows.items():
        table.add_row(
            f"{active} of {layers}",
            f"{row['flops'] / 1e9:.2f} G ({row['flops'] / whole['flops']:.2f})",
            f"{row['kept_bytes'] / 2**20:.2f} MiB ({row['kept_bytes'] / whole['kept_bytes']:.2f})",
            f"{1e3 * row['seconds']:.1f} ms ({row['seconds'] / whole['seconds']:.2f})",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
