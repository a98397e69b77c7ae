"""The ``tiedlora analyze`` commands. Each writes a heat map and, beside it, its numbers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_tiedlora.console import progress, show
from nemo_tiedlora.errors import UsageError, check_choice
from nemo_tiedlora.options import AsJson, BaseName

if TYPE_CHECKING:
    from nemo_tiedlora.analysis.host import AnalysedBase

app = typer.Typer(
    help="Heat maps of layers, subspaces, conversion matrices and allocations, with their numbers.",
    no_args_is_help=True,
)

Adapter = Annotated[Path, typer.Option(help="A saved adapter: a .nemo or a folder.")]
Out = Annotated[Path, typer.Option(help="Heat map to write (.png); the numbers take the same name with .json.")]


@app.command()
def layers(
    base: BaseName,
    data: Annotated[Path, typer.Option(help="Calibration text: JSONL or plain text, one sample per line.")],
    samples: Annotated[int, typer.Option(help="Texts to use.", min=1)] = 256,
    field: Annotated[str, typer.Option(help="Field of the JSONL rows.")] = "text",
    length: Annotated[int, typer.Option(help="Tokens of a text to use.", min=1)] = 512,
    similarity: Annotated[str, typer.Option(help="angular or cosine.")] = "angular",
    out: Out = Path("layers.png"),
    as_json: AsJson = False,
) -> None:
    """How similar the outputs of a base's layers are (ShareLoRA, figure 1)."""
    _start(out)
    check_choice("similarity", similarity, ("angular", "cosine"))
    from nemo_tiedlora.analysis.heatmap import Panel
    from nemo_tiedlora.analysis.layers import off_diagonal_mean
    from nemo_tiedlora.analysis.texts import read_texts

    named = base_of(base)
    matrix = named.similarity(read_texts(data, samples, field), length, similarity)
    numbers = {"average": off_diagonal_mean(matrix), "similarity": matrix}
    names = range(len(matrix))
    panel = Panel(matrix, "Similarity of layer outputs", names, names)
    _finish(numbers, [[panel]], f"{similarity} similarity", out, {"average": numbers["average"]}, as_json)


@app.command()
def subspace(
    base: BaseName,
    adapter: Adapter,
    other: Annotated[Path | None, typer.Option(help="Adapter to compare with; without it, W itself.")] = None,
    out: Out = Path("subspace.png"),
    as_json: AsJson = False,
) -> None:
    """How similar the subspaces of an adapter are to those of another, or of W (CondLoRA, equation 2).

    The heat map shows the mean over layers, for all numbers of singular vectors up to the rank.
    """
    _start(out)
    import torch

    from nemo_tiedlora.analysis import subspace as subspaces

    named = base_of(base)
    named.check(adapter, "adapter")
    if other:
        named.check(other, "other")
    adapted = named.adapted(adapter)
    ours = {site: subspaces.adapter_vectors(layer.factors) for site, layer in adapted.items()}
    if other:
        adapted = None  # one base in memory is enough
        theirs = {site: subspaces.adapter_vectors(one.factors) for site, one in named.adapted(other).items()}
    else:
        theirs = {
            site: subspaces.weight_vectors(layer.weight(torch.float64), len(layer.factors.A))
            for site, layer in progress(adapted.items(), "decomposing W", len(adapted))
        }
    compared = subspaces.compare(ours, theirs)
    summary = {
        f"{target} {part}": f"{one['mean'][-1][-1]:.3f} at i, j = {len(one['mean'])}, {len(one['mean'][0])}"
        for target, parts in compared.items()
        for part, one in parts.items()
    }
    numbers = {"adapter": str(adapter), "other": str(other) if other else "W", "targets": compared}
    panels = subspaces.panels(compared, "the other" if other else "W")
    _finish(numbers, panels, "φ, mean over layers", out, summary, as_json)


@app.command()
def conversion(base: BaseName, adapter: Adapter, out: Out = Path("conversion.png"), as_json: AsJson = False) -> None:
    """How similar the layers' conversion matrices from W to A and to B are, beside random ones (CondLoRA, figure 1)."""
    _start(out)
    import torch

    from nemo_tiedlora.analysis import conversion as conversions

    named = base_of(base)
    named.check(adapter, "adapter")
    adapted = named.adapted(adapter)
    matrices = {
        site: conversions.conversion_matrices(layer.weight(torch.float64), layer.factors)
        for site, layer in progress(adapted.items(), "inverting W", len(adapted))
    }
    compared = conversions.compare(matrices)
    summary = {
        f"{target} {name}": one["average"]
        for target, found in compared.items()
        for name, one in found.items()
        if name != "layers"
    }
    numbers = {"adapter": str(adapter), "targets": compared}
    _finish(numbers, conversions.panels(compared), "φ(rank, rank)", out, summary, as_json)


@app.command()
def allocation(
    file: Annotated[Path, typer.Argument(help="Allocation log of a DynaLoRA run (.json).")],
    out: Out = Path("allocation.png"),
    as_json: AsJson = False,
) -> None:
    """How many steps each module was active for (DynaLoRA, figure 5)."""
    _start(out)
    from dataclasses import asdict

    from nemo_tiedlora.analysis import allocation as allocations

    if out.with_suffix(".json").resolve() == file.resolve():
        raise UsageError("out", str(out), "its numbers would replace the log; give it another name")
    read = allocations.read(file)
    totals = zip(read.targets, zip(*read.active_steps, strict=True), strict=True)
    summary = {target: f"{sum(filter(None, steps)):,} active steps" for target, steps in totals}
    _finish(asdict(read), [[allocations.panel(read)]], "active steps", out, summary, as_json)


def base_of(named: str) -> "AnalysedBase":
    """The base that a user has named: a folder that transformers saved is run by transformers, all else by NeMo.

    Raises:
        UsageError: there is none of that name.
    """
    from nemo_tiedlora.huggingface.bases import NAMES
    from nemo_tiedlora.huggingface.families import CONFIG

    if named not in NAMES and (Path(named) / CONFIG).is_file():
        from nemo_tiedlora.huggingface.analysed import SavedModel

        return SavedModel(Path(named))
    from nemo_tiedlora.job.loaded import NemoBase

    return NemoBase(named)


def _start(out: Path) -> None:
    """What every command does before its work: check ``out``, and be gentle with the CPU."""
    from nemo_tiedlora.platform.threads import wait_passively

    wait_passively()
    if out.suffix != ".png":
        raise UsageError("out", str(out), "must end in .png; the numbers take the same name with .json")
    from nemo_tiedlora.files import check_output

    check_output(out.parent, "out")


def _finish(numbers: dict, panels: list[list], label: str, out: Path, summary: dict, as_json: bool) -> None:
    """Write the heat map and its numbers, and print them, or a summary."""
    from nemo_tiedlora.analysis.heatmap import draw
    from nemo_tiedlora.files import write_text

    file = out.with_suffix(".json")
    write_text(file, json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    draw(panels, label, out)
    show(numbers if as_json else summary | {"heat_map": str(out), "numbers": str(file)}, as_json)
