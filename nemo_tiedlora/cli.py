"""The ``tiedlora`` command. Each subcommand reads its options and calls the room that does the work."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from nemo_tiedlora import __version__, analyze, console, own_methods, scripts
from nemo_tiedlora.console import BASES, show
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.options import AsJson, BaseName

app = typer.Typer(
    name="tiedlora",
    help="Adapters with tied, shared and conditional factors: train them, use them, and see what is in them.",
    epilog=own_methods.EPILOG,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(analyze.app, name="analyze")


def main() -> None:
    """Entry point."""
    console.run(app, take=own_methods.take)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tiedlora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What the command takes before any subcommand."""


class Script(TyperCommand):
    """A command that leaves its arguments as they are, ``--help`` and ``--`` too: they are a script's."""

    def parse_args(self, ctx, args):
        ctx.args = args
        return args


@app.command(cls=Script)
def finetune(context: typer.Context) -> None:
    """Fine-tune a NeMo GPT with any scheme: what examples/megatron_gpt_finetuning.py does."""
    scripts.run("megatron_gpt_finetuning.py", "tiedlora finetune", context.args)


@app.command(cls=Script)
def generate(context: typer.Context) -> None:
    """Continue prompts with a base model and a saved adapter: what examples/megatron_gpt_generate.py does."""
    scripts.run("megatron_gpt_generate.py", "tiedlora generate", context.args)


@app.command(name="run", cls=Script)
def run_script(context: typer.Context) -> None:
    """Run a NeMo script as it is, with every scheme added to NeMo: tiedlora run SCRIPT.py ARGUMENTS."""
    if not context.args or context.args[0] in ("--help", "-h"):
        print(context.get_help())
        return
    from nemo_tiedlora.platform.threads import wait_passively

    wait_passively()
    from nemo_tiedlora.job import stock_script

    script, *arguments = context.args
    stock_script.run(Path(script), arguments)


@app.command(name="lm-eval", cls=Script)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with its model nemo_tiedlora: --model_args base=BASE.nemo,adapter=ADAPTER.nemo."""
    from importlib.util import find_spec

    if not find_spec("lm_eval"):
        raise UsageError("lm-eval", None, "lm-evaluation-harness is not installed: pip install lm_eval")
    from nemo_tiedlora.platform.threads import wait_passively

    wait_passively()
    from nemo_tiedlora.job import lm_eval_model

    lm_eval_model.main(context.args)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """Every method by name, with its settings in JSON."""
    from nemo_tiedlora.variants import METHODS

    if as_json:
        facts = {name: {"summary": method.summary, "settings": method.settings()} for name, method in METHODS.items()}
    else:
        facts = {name: method.summary for name, method in METHODS.items()}
    show(facts, as_json)


@app.command()
def params(
    scheme: Annotated[str, typer.Option(help="Method; tiedlora methods lists them.")] = "tied_lora",
    rank: Annotated[int, typer.Option(help="r.")] = 8,
    preset: Annotated[str | None, typer.Option(help="tied_lora: TL1 to TL6, VeRA or LoRA.")] = None,
    groups: Annotated[
        str | None, typer.Option(help="share_lora: lists as JSON, a file, odd_even or random_adjacent.")
    ] = None,
    rank_expansion: Annotated[str | None, typer.Option(help="share_lora: none, budget or a rank.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of the scheme, as name=value; repeatable.")
    ] = None,
    targets: Annotated[str, typer.Option(help="Target modules, separated by commas.")] = "attention_qkv",
    base: Annotated[str | None, typer.Option(help=f"Take the shape from this base: {BASES}, or smollm2.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads; needed with --query-groups.")] = None,
    query_groups: Annotated[int | None, typer.Option(help="Query groups (GQA).")] = None,
    ffn: Annotated[int | None, typer.Option(help="Feed-forward size; by default 4 · hidden.")] = None,
    gated: Annotated[bool, typer.Option(help="fc1 is a fused gate and up projection.")] = True,
    as_json: AsJson = False,
) -> None:
    """Trainable, stored and total parameters of an adapter, without building a model."""
    from dataclasses import asdict

    from nemo_tiedlora.model.data import ModelConfig
    from nemo_tiedlora.model.sizes import sizes
    from nemo_tiedlora.variants import config_for

    if base:
        from nemo_tiedlora.huggingface.bases import find

        model = find(base).config
    else:
        if query_groups is None and heads is None:
            heads = 1  # without query groups the projections' sizes do not depend on it
        shape = {
            "layers": layers,
            "hidden": hidden,
            "heads": heads,
            "ffn": 4 * hidden if ffn is None and hidden else ffn,
        }
        for name, value in shape.items():
            if value is None or value < 1:
                raise UsageError(name, value, "must be at least 1; or take the shape from --base")
        if hidden % heads or (query_groups is not None and (query_groups < 1 or heads % query_groups)):
            raise UsageError("heads", heads, f"must divide hidden ({hidden}) and be a multiple of query groups")
        model = ModelConfig(
            {
                "num_layers": layers,
                "hidden_size": hidden,
                "ffn_hidden_size": shape["ffn"],
                "num_attention_heads": heads,
                "num_query_groups": query_groups,
                "activation": "fast-swiglu" if gated else "gelu",
            }
        )
    settings = {"rank": rank, "target_modules": targets.split(","), **_settings(setting or [])}
    if preset is not None:
        settings["preset"] = preset
    if groups is not None:
        settings["groups"] = _lists(groups) if groups.startswith("[") else groups
    if rank_expansion is not None:
        settings["rank_expansion"] = int(rank_expansion) if rank_expansion.isdigit() else rank_expansion
    show(asdict(sizes(config_for(scheme, settings), model)), as_json)


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="A saved adapter: a .nemo or a folder.")],
    as_json: AsJson = False,
) -> None:
    """Describe a saved adapter: method, targets, rank, counts, seed, and the base it was trained on."""
    from dataclasses import asdict

    from nemo_tiedlora.checkpoint.saved import saved_config
    from nemo_tiedlora.model.config import STOCK_SCHEMES
    from nemo_tiedlora.model.sizes import sizes
    from nemo_tiedlora.model.targets import SHAPE_FIELDS
    from nemo_tiedlora.variants import METHODS, config_for

    saved = saved_config(adapter, "adapter")
    scheme = (saved.get("peft") or {}).get("peft_scheme")
    if scheme in (None, "none"):
        raise UsageError("adapter", str(adapter), "a whole model, not an adapter")
    settings = saved["peft"].get(f"{scheme}_tuning" if scheme in METHODS else STOCK_SCHEMES.get(scheme, "")) or {}
    facts = {"scheme": scheme, **settings}
    if scheme in METHODS:
        facts |= asdict(sizes(config_for(scheme, settings), saved))
    files = adapter.iterdir() if adapter.is_dir() else [adapter]
    facts["file_bytes"] = sum(file.stat().st_size for file in files)
    facts["base"] = {"file": saved.get("restore_from_path"), **{name: saved.get(name) for name in SHAPE_FIELDS}}
    show(facts, as_json)


@app.command()
def groups(
    base: BaseName,
    data: Annotated[Path, typer.Option(help="Calibration text: JSONL or plain text, one sample per line.")],
    samples: Annotated[int, typer.Option(help="Texts to use, drawn from all.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Of the draw.", min=0)] = 1234,
    field: Annotated[str, typer.Option(help="Field of the JSONL rows.")] = "text",
    length: Annotated[int, typer.Option(help="Tokens of a text to use.", min=1)] = 512,
    threshold: Annotated[float, typer.Option(help="Least similarity of layers that share.")] = 0.85,
    similarity: Annotated[str, typer.Option(help="angular or cosine.")] = "angular",
    grouping: Annotated[
        str, typer.Option(help="complete (every pair is similar enough) or greedy (Algorithm 1 of the paper).")
    ] = "complete",
    rank: Annotated[int, typer.Option(help="Rank to report savings for.", min=1)] = 8,
    rank_expansion: Annotated[str, typer.Option(help="none, budget or a rank.")] = "none",
    targets: Annotated[
        str | None,
        typer.Option(
            help="Target modules to report savings for, separated by commas; by default attention_qkv, or all-linear "
            "of a model that NeMo does not run."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON file to write; the heat map goes beside it.")] = Path("groups.json"),
    as_json: AsJson = False,
) -> None:
    """Find layers of a base that can share factors (ShareLoRA), from its outputs over a calibration text."""
    from nemo_tiedlora.analysis.heatmap import Panel, draw
    from nemo_tiedlora.analysis.texts import read_texts
    from nemo_tiedlora.errors import check_choice
    from nemo_tiedlora.files import check_output, write_text
    from nemo_tiedlora.platform.threads import wait_passively
    from nemo_tiedlora.variants import SharedConfig
    from nemo_tiedlora.variants.groups import GROUPINGS

    wait_passively()
    check_choice("similarity", similarity, ("angular", "cosine"))
    check_choice("grouping", grouping, GROUPINGS)
    named = analyze.base_of(base)
    if out.suffix != ".json":
        raise UsageError("out", str(out), "must end in .json; the heat map takes the same name with .png")
    check_output(out.parent, "out")
    texts = read_texts(data, samples, field, seed)
    expansion = int(rank_expansion) if rank_expansion.isdigit() else rank_expansion
    settings = {"rank": rank, "target_modules": targets.split(",") if targets else named.targets}
    settings["rank_expansion"] = expansion
    named.sizes(SharedConfig(groups=[], **settings))  # refuses bad settings before anything is computed

    matrix = named.similarity(texts, length, similarity)
    found = GROUPINGS[grouping](matrix, threshold)
    counted = named.sizes(SharedConfig(groups=found, **settings))
    result = {
        "groups": found,
        "trainable": counted.trainable,
        "percent_of_lora": counted.percent_of_lora,
        "rank": counted.rank,
        "settings": {
            "threshold": threshold,
            "similarity": similarity,
            "grouping": grouping,
            "data": str(data),
            "samples": len(texts),
            "seed": seed,
            "length": length,
        },
        "base_sha256": named.sha256(),
        "similarity": matrix,
    }
    write_text(out, json.dumps(result, indent=1) + "\n")
    picture = out.with_suffix(".png")
    names = range(len(matrix))
    panel = Panel(matrix, "Similarity of layer outputs; groups framed", names, names, frames=found)
    draw([[panel]], "similarity", picture)
    shown_facts = {name: result[name] for name in ("groups", "trainable", "percent_of_lora", "rank")}
    show(shown_facts | {"file": str(out), "heat_map": str(picture)}, as_json)


@app.command()
def merge(
    base: BaseName,
    adapter: Annotated[Path, typer.Option(help="Adapter: a .nemo or a folder.")],
    out: Annotated[Path, typer.Option(help="The .nemo to write.")],
    unmerge: Annotated[bool, typer.Option("--unmerge", help="Take the adapter out of a merged base.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also with a base of other weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter into its base: an ordinary .nemo that needs no adapter, and no more memory than one weight."""
    from nemo_tiedlora.checkpoint import merge as merging
    from nemo_tiedlora.checkpoint import read
    from nemo_tiedlora.files import check_not_among, check_output
    from nemo_tiedlora.huggingface.bases import find
    from nemo_tiedlora.model.config import check_shape
    from nemo_tiedlora.platform.threads import wait_passively

    wait_passively()
    if out.suffix != ".nemo":
        raise UsageError("out", str(out), "must end in .nemo")
    check_not_among(out, base, adapter)
    check_output(out.parent, "out")
    found = find(base)
    check_shape(read(adapter).shape, found.config, "adapter", adapter)  # before the base is taken over
    show((merging.unmerge if unmerge else merging.merge)(found.file(), adapter, out, force), as_json)


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(help="A LoRA adapter as NeMo saves it (.nemo), of one rank or many.")],
    out: Annotated[Path, typer.Option(help="A folder to write, or a .nemo.")],
    base: Annotated[str | None, typer.Option(help=f"Record this base as the one it was trained on: {BASES}.")] = None,
    as_json: AsJson = False,
) -> None:
    """Take a LoRA adapter in NeMo's own format over as one of scheme tied_lora, preset LoRA, in one file."""
    from dataclasses import replace

    from nemo_tiedlora.checkpoint import Base, legacy, write
    from nemo_tiedlora.checkpoint.base import open_base
    from nemo_tiedlora.files import check_output
    from nemo_tiedlora.model.config import check_shape

    check_output(out.parent, "out")
    converted = legacy.convert(adapter)
    if base:
        from nemo_tiedlora.huggingface.bases import find

        found = find(base)
        check_shape(converted.shape, found.config, "base", base)
        with open_base(found.file()) as opened:
            converted = replace(converted, base=Base.of(opened.config, opened.checksums(converted.paths)))
    sha256 = write(converted, out)
    parameters = sum(tensor.numel() for tensor in converted.tensors.values())
    facts = {"file": str(out), "scheme": converted.scheme, "trainable": parameters, "adapter_sha256": sha256}
    show(facts | {name: converted.settings[name] for name in ("rank", "alpha", "target_modules")}, as_json)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="A saved adapter of any method: a .nemo or a folder.")],
    base: BaseName,
    out: Annotated[Path, typer.Option(help="A folder to write; a .nemo for nemo-lora, a .gguf for gguf-lora.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="peft-lora: for Hugging Face PEFT, vLLM, TensorRT-LLM; peft-vera: PEFT's VeRA; "
            "nemo-lora: stock NeMo's LoRA, of one rank; gguf-lora: for llama.cpp.",
        ),
    ] = "peft-lora",
    dtype: Annotated[str, typer.Option(help="Of the tensors: float32, bfloat16 or float16.")] = "float32",
    base_name: Annotated[str | None, typer.Option(help="The model's name, for PEFT's config.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also with a base of other weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter of any method as one that others read: its factors, layer by layer, as a plain LoRA."""
    from nemo_tiedlora.huggingface.export import export
    from nemo_tiedlora.platform.threads import wait_passively

    wait_passively()
    show(export(adapter, base, form, out, dtype, base_name, force), as_json)


@app.command(name="import-peft")
def import_peft(
    adapter: Annotated[Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    base: BaseName,
    out: Annotated[Path, typer.Option(help="A folder to write, or a .nemo.")],
    as_json: AsJson = False,
) -> None:
    """Take a LoRA, DoRA or VeRA adapter of Hugging Face PEFT over as one of ours."""
    from nemo_tiedlora.files import check_output
    from nemo_tiedlora.huggingface.peft_import import import_peft
    from nemo_tiedlora.platform.threads import wait_passively

    wait_passively()
    check_output(out.parent, "out")
    show(import_peft(adapter, base, out), as_json)


@app.command(name="import-hf")
def import_hf(
    model: Annotated[
        Path, typer.Argument(help="Folder with config.json, *.safetensors and tokenizer.json; or a GGUF file.")
    ],
    out: Annotated[Path, typer.Option(help="The .nemo to write.")],
    vocab_divisible_by: Annotated[
        int, typer.Option(help="Add rows of zeros to the vocabulary up to a multiple of this.", min=1, max=2**16)
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Take a Hugging Face model or a GGUF file over as a base: Llama 1 to 3.x, SmolLM 1 and 2, Mistral without a
    sliding window, Qwen2, Qwen2.5, Qwen3, Gemma 1, GPT-2. Any other, and any setting that would compute something else,
    is refused by name."""
    from nemo_tiedlora.files import check_output
    from nemo_tiedlora.huggingface.taken_over import take_over

    if out.suffix != ".nemo":
        raise UsageError("out", str(out), "must end in .nemo")
    check_output(out.parent, "out")
    show(take_over(model, out, vocab_divisible_by), as_json)


@app.command(name="export-hf")
def export_hf(
    base: Annotated[str, typer.Argument(help=f"Base model: {BASES}, or smollm2, or builtin.")],
    out: Annotated[Path, typer.Option(help="The folder to write, which is new or empty.")],
    as_json: AsJson = False,
) -> None:
    """Write a base as a folder that transformers loads, bit by bit the one it was made of; the built-in base and others
    too, if a Llama, Qwen2, Qwen3, Gemma 1 or GPT-2 computes the same. Any other is refused by what differs."""
    from nemo_tiedlora.files import check_output
    from nemo_tiedlora.huggingface.bases import base_at
    from nemo_tiedlora.huggingface.given_back import give_back

    check_output(out.parent, "out")
    show(give_back(base_at(base), out), as_json)


@app.command()
def table(as_json: AsJson = False) -> None:
    """The parameter columns (P%) of the Tied-LoRA paper's table 2, as Markdown."""
    from nemo_tiedlora.analysis import paper_table

    if as_json:
        print(json.dumps([cell._asdict() for cell in paper_table.cells()], indent=2))
    else:
        print(paper_table.markdown(), end="")


def _settings(given: list[str]) -> dict:
    """``name=value`` as YAML would read them; ``section.name=value`` for one in a section."""
    from nemo_tiedlora.model.data import load, over, yaml_reader

    found: dict = {}
    for setting in given:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError("set", setting, "write name=value, such as inner=vera")
        try:
            value = load(text)
        except (yaml_reader().YAMLError, ValueError) as error:
            raise UsageError("set", setting, f"not readable as YAML ({type(error).__name__})") from None
        for part in reversed(name.split(".")):
            value = {part: value}
        found = over(found, value)
    return found


def _lists(text: str) -> list:
    try:
        return json.loads(text)
    except ValueError:
        raise UsageError("groups", text, "write lists as JSON, such as [[0, 1], [4, 5, 6]]") from None


if __name__ == "__main__":
    main()
