"""A Hugging Face model's folder as a base; nothing in it is run."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers.models.auto import modeling_auto as known

from nemo_tiedlora.facade import UsageError, content_of, first_line, heads_of, quiet_transformers

#: What of a folder makes the base what it is.
FILES = (
    "config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model",
)  # fmt: skip
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}
#: An encoder takes a head, the others write; a vision-language model is used as the decoder in it.
Kind = Literal["encoder", "decoder", "vision-language"]


class ModelFolder:
    """What is known of a model before its weights are read.

    Raises:
        UsageError: no such folder, no model with safetensors in it, or one of a kind that is not trained here.
    """

    def __init__(self, named: str | Path):
        self.path = Path(named)
        if not (self.path / "config.json").is_file():
            way_out = "host hf trains on the folder of a Hugging Face model; a .nemo and the named bases are for "
            way_out += "--host nemo, and tiedlora export-hf makes such a folder of one"
            raise UsageError("base", str(named), way_out)
        if not list(self.path.glob("*.safetensors")):
            raise UsageError("base", str(named), "there is no .safetensors in it; save the model with save_pretrained")
        self.config = self._read(transformers.AutoConfig)
        self.kind = self._kind()

    def _read(self, auto: Any, **settings: Any) -> Any:
        try:
            with quiet_transformers():
                return auto.from_pretrained(self.path, local_files_only=True, trust_remote_code=False, **settings)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise UsageError("base", str(self.path), f"transformers cannot load it: {first_line(error)}") from None

    def _kind(self) -> Kind:
        kind, named = type(self.config), (self.config.architectures or [""])[0]
        if self.config.is_encoder_decoder:
            way_out = f"a {named or kind.__name__} is an encoder-decoder, which is not trained here; name a decoder"
            raise UsageError("base", str(self.path), way_out)
        if kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(self.config, "vision_config"):
            return "vision-language"
        if not named.endswith(("ForCausalLM", "LMHeadModel")) and kind in known.MODEL_FOR_MASKED_LM_MAPPING:
            return "encoder"
        if kind in known.MODEL_FOR_CAUSAL_LM_MAPPING:
            return "decoder"
        way_out = f"a {named or kind.__name__} neither writes nor reads text as an encoder"
        raise UsageError("base", str(self.path), way_out)

    @property
    def takes_head(self) -> bool:
        """Whether transformers has a class of it with a head for texts."""
        return type(self.config) in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    @property
    def text_config(self) -> Any:
        """The config of what reads text, which may be a part."""
        return self.config.get_text_config()

    @property
    def context(self) -> int:
        """The most tokens of a text."""
        found = getattr(self.text_config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        if self.kind == "encoder" and self.config.model_type in ("roberta", "xlm-roberta", "camembert"):
            found -= self.config.pad_token_id + 1  # where their positions begin
        return min(found, self.tokenizer.model_max_length)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the model's and the tokenizer's files (hexadecimal)."""
        digest = hashlib.sha256()
        for path in sorted({path for pattern in FILES for path in self.path.glob(pattern)}):
            digest.update(f"{path.name} {content_of(path)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, which pads with the end of text where it has nothing else."""
        found = self._read(transformers.AutoTokenizer)
        if found.pad_token_id is None:
            found.pad_token = found.eos_token
        if found.pad_token_id is None or (self.kind != "encoder" and found.eos_token_id is None):
            raise UsageError("base", str(self.path), "its tokenizer has no end-of-text token (eos_token)")
        return found

    def outline(self, outputs: int | None) -> Any:
        """The model without weights; ``outputs`` as in ``load``."""
        with torch.device("meta"), quiet_transformers():
            return self._auto(outputs).from_config(self._config(outputs))

    def load(self, outputs: int | None, precision: str) -> Any:
        """The model in memory, on a GPU if there is one.

        Args:
            outputs: of its head; None for a model that writes.

        Raises:
            UsageError: the folder has not all weights but those of the head.
        """
        torch.manual_seed(0)  # of a pooler, which some bases have and some not
        model, found = self._read(
            self._auto(outputs), config=self._config(outputs), torch_dtype=DTYPES[precision], use_safetensors=True,
            ignore_mismatched_sizes=outputs is not None, output_loading_info=True,
        )  # fmt: skip
        new = tuple(f"{name}." for name in heads_of(model))
        missing = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
        for name in sorted(missing):
            if outputs is None or not (name.startswith(new) or ".pooler." in name):
                raise UsageError("base", str(self.path), f"{name} is missing in its weights, or of another shape")
        model.generation_config = transformers.GenerationConfig()  # how it would be sampled from is not the suite's
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def _auto(self, outputs: int | None) -> Any:
        if outputs is not None:
            return transformers.AutoModelForSequenceClassification
        if self.kind == "vision-language":
            return transformers.AutoModelForImageTextToText
        return transformers.AutoModelForCausalLM

    def _config(self, outputs: int | None) -> Any:
        config = self._read(transformers.AutoConfig)
        if outputs is None:
            _without_dropout(config)  # as the workbench trains
        else:
            config.num_labels = outputs
            if config.pad_token_id is None:  # decoders look for the last token of a text
                config.pad_token_id = self.tokenizer.pad_token_id
        return config


def _without_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            _without_dropout(value)
        elif isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
