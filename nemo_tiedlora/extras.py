"""What comes with which extra of this package, and what to say where one is not installed."""

from nemo_tiedlora.errors import UsageError

#: Modules that the core does without, by the smallest extra that has them.
EXTRAS = {
    "cli": ("matplotlib", "rich", "typer", "yaml"),
    "hf": ("accelerate", "sentencepiece", "tokenizers", "transformers"),
    "suite": ("datasets", "gymnasium", "jinja2", "pyarrow", "rouge_score", "ruamel", "sacrebleu", "scipy", "sklearn"),
    "peft": ("peft",),
    "nemo": ("hydra", "lightning", "megatron", "nemo", "omegaconf"),
}


def lacking(error: ModuleNotFoundError) -> UsageError | None:
    """The extra that a failed import needs; None if it is none of ours."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            way_out = f"not installed (there is no module {module}): pip install 'nemo_tiedlora[{extra}]'"
            return UsageError("extra", extra, way_out)
    return None
