"""A model's folder or GGUF file becomes a base: ``.nemo`` with its weights, its config and its tokenizer."""

from __future__ import annotations

import fcntl
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nemo_tiedlora.console import note, progress
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.files import cache_folder, content_of, replacing
from nemo_tiedlora.huggingface.families import CONFIG, family_of, model_config, read_config
from nemo_tiedlora.huggingface.gguf_file import is_gguf
from nemo_tiedlora.huggingface.parts import Part, fill, parts
from nemo_tiedlora.huggingface.record import RECORD, recorded
from nemo_tiedlora.huggingface.weights import DTYPES, Weights
from nemo_tiedlora.model import tokenizer
from nemo_tiedlora.model.data import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_tiedlora.checkpoint.packed import Piece

#: More than any tokenizer has.
MOST_TOKENIZER = 2**28
#: Part of the names in the cache: another number where the same folder becomes another base.
FORM = 2
#: What other versions of transformers saved beside the weights, and every version computes.
COMPUTED = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")


def is_model(path: Path) -> bool:
    """Whether there is a folder with a model's config, or a GGUF file."""
    return (path / CONFIG).is_file() or is_gguf(path)


class Model:
    """A model in a folder, known to be one that can be taken over; its weights' values are still unread.

    Args:
        vocabulary_divisible_by: rows of zeros are added to the vocabulary up to a multiple of it.

    Attributes:
        config: NeMo's. rows: of the vocabulary in the base. tokens: of the tokenizer.

    Raises:
        UsageError: another architecture, a field or a shape that does not fit, a damaged or missing file.
    """

    def __init__(self, folder: Path, vocabulary_divisible_by: int = 1):
        self.folder = folder
        config = self._read_config()
        self.family, self.architecture = family_of(config), config["architectures"][0]
        self.config = model_config(config)
        self.vocabulary = config.get("vocab_size")
        if type(self.vocabulary) is not int or self.vocabulary < 1:
            raise UsageError("vocab_size", self.vocabulary, f"in {CONFIG}; must be a whole number above 0")
        self.rows = math.ceil(self.vocabulary / vocabulary_divisible_by) * vocabulary_divisible_by
        self.weights = self._open_weights()
        self.shape = ModelConfig(self.config)
        self.parts = list(parts(self.family.modules, self.shape, self.vocabulary, self.rows))
        self._check_weights()
        self.config[RECORD] = recorded(folder, config)
        self.tokenizer, self.settings, self.tokens = self._read_tokenizer(config)
        if self.tokens > self.rows:
            way_out = f"in {CONFIG}; the tokenizer has {self.tokens} tokens, for which there would be no weights"
            raise UsageError("vocab_size", self.vocabulary, way_out)
        # NeMo fills the tokenizer's up to a multiple of this, times the tensor-parallel size.
        spare = self.rows - self.tokens
        self.config["make_vocab_size_divisible_by"] = next(
            divisor for divisor in range(spare + 1, self.rows + 1) if self.rows % divisor == 0
        )

    def _read_config(self) -> dict[str, Any]:
        return read_config(self.folder)

    def _open_weights(self) -> Weights:
        return Weights(self.folder, self.family.modules.words.partition(".")[0])

    def _read_tokenizer(self, config: dict[str, Any]) -> tuple[bytes, dict[str, Any], int]:
        return _tokenizer(self.folder, config)

    def _check_weights(self) -> None:
        found = self.weights.shapes
        expected = {source.name: source.shape for part in self.parts for source in part.sources}
        for part in self.parts:
            types = {self.weights.dtypes.get(source.name) for source in part.sources} - {None}
            if len(types) > 1:
                names = ", ".join(source.name for source in part.sources)
                raise self._error(f"{names} are of different types, {', '.join(sorted(types))}")
        for name, shape in expected.items():
            if name not in found:
                raise self._error(f"the tensor {name} is missing, which {CONFIG} asks for")
            if found[name] != shape:
                raise self._error(f"the tensor {name} has shape {found[name]}; {CONFIG} says {shape}")
            if self.weights.dtypes[name] not in DTYPES:
                raise self._error(f"{name} is of type {self.weights.dtypes[name]}; only {', '.join(DTYPES)} can be")
        for name in found:
            tied = name == "lm_head.weight" and self.config["share_embeddings_and_output_weights"]
            if name not in expected and not tied and not name.endswith(COMPUTED):
                raise self._error(f"there is no place for its tensor {name} in a {self.architecture}")

    def _error(self, reason: str) -> UsageError:
        return UsageError("model", str(self.folder), reason)

    def parameters(self) -> int:
        """How many there are, the vocabulary's added rows not among them."""
        return sum(math.prod(source.shape) for part in self.parts for source in part.sources)

    def write(self, out: Path) -> None:
        """Write the base, tensor by tensor, to ``out``, whose place it takes when it is whole.

        Raises:
            UsageError: NaN or infinity in a weight; a full disk.
        """
        from nemo_tiedlora.checkpoint.packed import pack

        settings = json.dumps(self.settings, ensure_ascii=False).encode()
        # NeMo tells the files of several models apart by such names.
        files = {f"{sha256(content).hexdigest()[:32]}_{name}": content for name, content in
                 ((tokenizer.TOKENIZER, self.tokenizer), (tokenizer.SETTINGS, settings))}  # fmt: skip
        inside = [f"nemo:{name}" for name in files]
        library = {"library": "huggingface", "type": None, "model": inside[0], "merge_file": inside[1]}
        library |= {"vocab_file": None, "delimiter": None, "use_fast": True, "sentencepiece_legacy": False}
        with replacing(out) as unfinished, tarfile.open(unfinished, "w", format=tarfile.GNU_FORMAT) as tar:
            pack(tar, self.config | {"tokenizer": library}, files, self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        from nemo_tiedlora.checkpoint.packed import Piece

        with self.weights:
            for part in progress(self.parts, "taking over", len(self.parts)):
                if part.layer is None:
                    yield Piece(part.name, self._made(part))
                else:
                    yield Piece(part.name, self._made(part), part.layer, self.config["num_layers"])

    def _made(self, part: Part) -> Tensor:
        """One tensor of the base. Its sources come one after another, so that there is one beside it."""
        first, *more = part.sources
        tensor = self.weights.read(first.name)
        if not more and tensor.shape == part.shape and len(first.targets) < 2 and not first.transposed:
            return tensor
        new = tensor.new_empty if first.targets else tensor.new_zeros
        made = new(part.shape)
        fill(made, first, tensor, self.shape)
        for source in more:
            del tensor  # else it would be there beside the next
            tensor = self.weights.read(source.name)
            fill(made, source, tensor, self.shape)
        return made


def model_at(path: Path, vocabulary_divisible_by: int = 1) -> Model:
    """The model in a folder or a GGUF file; see ``Model``."""
    if not is_gguf(path):
        return Model(path, vocabulary_divisible_by)
    from nemo_tiedlora.huggingface.gguf_model import GgufModel

    return GgufModel(path, vocabulary_divisible_by)


def take_over(path: Path, out: Path, vocabulary_divisible_by: int = 1) -> dict[str, Any]:
    """Write the model at ``path`` as a base, and say what it is; see ``Model``."""
    model = model_at(path, vocabulary_divisible_by)
    model.write(out)
    return {
        "file": str(out),
        "architecture": model.architecture,
        "parameters": model.parameters(),
        "layers": model.config["num_layers"],
        "hidden": model.config["hidden_size"],
        "context": model.config["encoder_seq_length"],
        "types": ", ".join(
            sorted({model.weights.dtypes[source.name] for part in model.parts for source in part.sources})
        ),
        "vocabulary": model.rows,
        "tokens": model.tokens,
    }


def base_of(model: Model) -> Path:
    """The base that is made of a model, kept under the checksum of all of its files in the user's cache folder.

    Of several processes that ask for it at once, one makes it.

    Raises:
        UsageError: see ``Model.write``; or the cache folder cannot be written.
    """
    contents = [content_of(path) for path in model.weights.files]
    contents += [sha256(content).hexdigest() for content in (
        model.tokenizer, json.dumps([FORM, model.settings, model.config], sort_keys=True).encode()
    )]  # fmt: skip
    name = f"huggingface-{sha256(' '.join(contents).encode()).hexdigest()[:16]}.nemo"
    return kept(name, f"{model.folder} is taken over as", model.write)


def kept(name: str, saying: str, make: Callable[[Path], None]) -> Path:
    """The base of this name in the user's cache folder; where there is none, ``make`` writes it.

    Of several processes that ask for it at once, one makes it.

    Args:
        saying: what is said before, followed by the file's path.

    Raises:
        UsageError: the cache folder cannot be written; or ``make`` does.
    """
    try:
        path = cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            note(f"{saying} {path}")
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    make(path)
    except (OSError, RuntimeError) as error:
        way_out = f"no base can be kept there ({error}); set it to a folder that can be written"
        raise UsageError("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME"), way_out) from None
    return path


def _tokenizer(folder: Path, config: dict[str, Any]) -> tuple[bytes, dict[str, Any], int]:
    """The tokenizer's file, its settings, and how many tokens it has.

    Raises:
        UsageError: there is none that is data alone, or it does not say where a text ends.
    """
    path = folder / tokenizer.TOKENIZER
    if not path.is_file():
        way_out = f"there is no {tokenizer.TOKENIZER} in it; load the tokenizer with transformers (use_fast=True) and "
        raise UsageError("model", str(folder), f"{way_out}save it there with save_pretrained")
    if path.stat().st_size > MOST_TOKENIZER:
        raise UsageError("model", str(path), f"larger than a tokenizer can be: more than {MOST_TOKENIZER:,} bytes")
    content = path.read_bytes()
    given: dict[str, Any] = {}
    for name in ("special_tokens_map.json", tokenizer.SETTINGS):
        if (folder / name).is_file():
            given |= read_config(folder, name, most=2**26)
    template = folder / "chat_template.jinja"
    if template.is_file() and template.stat().st_size < 2**20:
        given["chat_template"] = template.read_text(encoding="utf-8")
    settings = tokenizer.settings_of(given)
    import transformers

    try:
        before = json.loads(content).get("pre_tokenizer") or {}
        settings["add_prefix_space"] = bool(before.get("add_prefix_space", False))  # else it would be set to False
        with TemporaryDirectory() as scratch:
            tokenizer.write(Path(scratch), content, settings)
            loaded = transformers.PreTrainedTokenizerFast.from_pretrained(scratch)
        for name in ("bos_token", "eos_token"):
            number = config.get(f"{name}_id")
            if settings.get(name) is None and type(number) is int:
                settings[name] = loaded.convert_ids_to_tokens(number)
    except Exception as error:  # tokenizers has no class of its own for what it refuses
        raise UsageError("model", str(path), f"not a tokenizer that can be loaded ({error})") from None
    if not settings.get("eos_token"):
        way_out = f"neither {tokenizer.SETTINGS} nor {CONFIG} says which token ends a text; name it in the former"
        raise UsageError("eos_token", None, f"in {folder}; {way_out}")
    ends = config.get("eos_token_id")
    end = loaded.convert_tokens_to_ids(tokenizer.text_of(settings["eos_token"]))
    if type(ends) in (int, list) and end not in (ends if isinstance(ends, list) else [ends]):
        way_out = f"the tokenizer ends a text with token {end}, {CONFIG} with {ends}; the former counts"
        note(f"{way_out}: change eos_token in {folder / tokenizer.SETTINGS} if that is wrong")
    return content, settings, len(loaded)
