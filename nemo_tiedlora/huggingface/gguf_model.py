"""A model in a GGUF file, as llama.cpp has them: what its settings, its tensors and its tokenizer are in transformers'
words."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.families import CONFIG, FAMILIES
from nemo_tiedlora.huggingface.gguf_file import PLAIN, GgufFile
from nemo_tiedlora.huggingface.taken_over import Model
from nemo_tiedlora.huggingface.weights import Weights
from nemo_tiedlora.model import tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

#: By ``general.architecture``; Mistral's models have Llama's.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
#: Below the architecture, and what transformers calls it.
SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
#: Read here too: the size of a head and of the vocabulary, which must be what they are without being said.
SIZES = ("rope.dimension_count", "attention.value_length", "vocab_size")
TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
#: By what Llama 3.1 to 3.3 divide the frequencies of their positions: a tensor here, and numbers elsewhere.
FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_FACTORS = (8.0, 32.0)
#: Types of ``Weights`` by the format's number; what is quantised becomes the first.
DTYPES = dict(zip(PLAIN, ("F32", "F16", "BF16"), strict=True))
#: How text is cut before merging, by ``tokenizer.ggml.pre``: a pattern; None is that of ``ByteLevel``.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {"gpt-2": None, "smollm": None, "qwen2": _WORDS % "", "llama-bpe": _WORDS % "{1,3}"}
#: Kinds of tokens.
CONTROL, OWN = 3, 4


class GgufModel(Model):
    """A model in a GGUF file, known to be one that can be taken over; its weights' values are still unread.

    What is quantised becomes float32, in which it is exact. See ``Model``.
    """

    def __init__(self, path: Path, vocabulary_divisible_by: int = 1):
        self.file = GgufFile(path)
        try:
            super().__init__(path, vocabulary_divisible_by)
        except UsageError as error:
            raise UsageError(error.field, error.value, error.way_out.replace(CONFIG, path.name)) from None

    def _read_config(self) -> dict[str, Any]:
        values = self.file.values
        architecture = values.get("general.architecture")
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UsageError("general.architecture", architecture, f"in {CONFIG}; what can be taken over: {known}")
        own = {name.removeprefix(f"{architecture}."): value for name, value in values.items()
               if name.startswith(f"{architecture}.")}  # fmt: skip
        config = {"architectures": [ARCHITECTURES[architecture]]}
        config |= {SETTINGS[name]: value for name, value in own.items() if name in SETTINGS}
        config["model_type"] = FAMILIES[ARCHITECTURES[architecture]].kind
        config["vocab_size"] = len(self._list("tokens"))
        config["tie_word_embeddings"] = "output.weight" not in self.file.tensors
        if own.get("rope.scaling.type", "none") != "none":
            factor = own.get("rope.scaling.factor")
            config["rope_scaling"] = {"rope_type": own["rope.scaling.type"], "factor": factor}
        if FREQUENCIES in self.file.tensors and architecture == "llama":
            config["rope_scaling"] = self._llama3(config, self._head(config))
        for name in ("bos_token_id", "eos_token_id"):
            config[name] = values.get(f"tokenizer.ggml.{name}")
        expected = dict.fromkeys(SIZES, self._head(config)) | {"vocab_size": config["vocab_size"]}
        for name, value in own.items():
            if name in SIZES and value != expected[name]:
                raise UsageError(f"{architecture}.{name}", value, f"in {CONFIG}; only {expected[name]} can be run here")
            if name not in (*SETTINGS, *SIZES, "rope.scaling.type", "rope.scaling.factor") and value:
                way_out = "not known to leave the result as it is"
                raise UsageError(f"{architecture}.{name}", value, f"in {CONFIG}; {way_out}")
        return config

    def _llama3(self, config: dict[str, Any], head: int | None) -> dict[str, Any]:
        """The numbers that the file's divisors were made of.

        Raises:
            UsageError: they are those of no known model.
        """
        base = config.get("rope_theta", 10000.0)
        if type(head) is int and self.file.tensors[FREQUENCIES].shape == (head // 2,) and type(base) is float:
            found = self.file.read(FREQUENCIES).tolist()
            for factor in LLAMA3_FACTORS:
                expected = [_divisor(base ** (-2 * number / head), factor) for number in range(head // 2)]
                if all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(found, expected, strict=True)):
                    return {"rope_type": "llama3", "factor": factor, **LLAMA3}
        raise self._error(f"its {FREQUENCIES} is not that of a Llama 3.1, 3.2 or 3.3; take its safetensors instead")

    def _head(self, config: dict[str, Any]) -> int | None:
        """The size of a head, if the config can be right at all."""
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if "head_dim" not in config and type(hidden) is int and type(heads) is int and heads:
            return hidden // heads
        return config.get("head_dim")

    def _list(self, name: str) -> list[Any]:
        value = self.file.values.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list) or not value:
            raise self._error(f"there is no tokenizer.ggml.{name} in it")
        return value

    def _open_weights(self) -> GgufWeights:
        return GgufWeights(self.file, self.config["num_attention_heads"], self.config["num_query_groups"])

    def _read_tokenizer(self, config: dict[str, Any]) -> tuple[bytes, dict[str, Any], int]:
        values, tokens = self.file.values, self._list("tokens")
        kinds = values.get("tokenizer.ggml.token_type") or [0] * len(tokens)
        if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
            raise self._error("its tokenizer.ggml.tokens do not fit their types, or are not all different")

        def named(name: str) -> str | None:
            number = values.get(f"tokenizer.ggml.{name}_token_id")
            return tokens[number] if type(number) is int and 0 <= number < len(tokens) else None

        settings = {"bos_token": named("bos"), "eos_token": named("eos"), "unk_token": named("unknown"),
                    "pad_token": named("padding")}  # fmt: skip
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
        settings["additional_special_tokens"] = [token for token in special if token not in settings.values()]
        settings["chat_template"] = values.get("tokenizer.chat_template")
        settings["clean_up_tokenization_spaces"] = False
        settings["add_prefix_space"] = False
        if not settings["eos_token"]:
            raise self._error("it has no tokenizer.ggml.eos_token_id, and so no token that ends a text")
        try:
            made = self._made_tokenizer(tokens, settings["unk_token"])
            self._add(made, tokens, kinds)
        except UsageError:
            raise
        except Exception as error:  # tokenizers has no class of its own for what it refuses
            raise self._error(f"its tokenizer cannot be read ({error})") from None
        return made.to_str().encode(), tokenizer.settings_of(settings), len(tokens)

    def _add(self, made: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
        from tokenizers import AddedToken

        for token, kind in zip(tokens, kinds, strict=True):
            if kind == CONTROL:
                made.add_special_tokens([AddedToken(token, normalized=False, special=True)])
            elif kind == OWN:
                made.add_tokens([AddedToken(token, normalized=False)])
        if made.get_vocab_size() != len(tokens):
            raise self._error("its special tokens are not among its tokens")

    def _made_tokenizer(self, tokens: list[str], unknown: str | None) -> Tokenizer:
        """The tokenizer without its special tokens.

        Raises:
            UsageError: of a kind that would cut texts in another way here.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        values = self.file.values
        numbers = {token: number for number, token in enumerate(tokens)}
        kind, cut = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
        if kind == "llama":  # sentencepiece
            merges = _merges(numbers, self._list("scores"))
            made = Tokenizer(models.BPE(numbers, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
            spaces = values.get("tokenizer.ggml.add_space_prefix", True)
            before = [normalizers.Prepend("▁")] if spaces else []
            after = [decoders.Strip(" ", 1, 0)] if spaces else []
            made.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
            made.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
            )
            return made
        if kind != "gpt2":
            raise UsageError("tokenizer.ggml.model", kind, f"in {CONFIG}; only gpt2 and llama can be read")
        if cut not in CUTS:
            raise UsageError("tokenizer.ggml.pre", cut, f"in {CONFIG}; what is known: {', '.join(CUTS)}")
        merges = [tuple(merge.split(" ")) for merge in self._list("merges")]
        made = Tokenizer(models.BPE(numbers, merges, ignore_merges=cut == "llama-bpe"))
        if cut == "qwen2":
            made.normalizer = normalizers.NFC()
        words = CUTS[cut]
        first = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
        first += [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm" else []
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)]
        )
        made.decoder = decoders.ByteLevel()
        return made


def _divisor(frequency: float, factor: float) -> float:
    low, high, length = LLAMA3.values()
    turns = length * frequency / (2 * math.pi)
    share = min(1.0, max(0.0, (turns - low) / (high - low)))
    return 1 / ((1 - share) / factor + share)


def _merges(numbers: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """What sentencepiece joins: any two tokens that make a third one, in the order of its score."""
    found = []
    for token, number in numbers.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(left, right) for left, right in pairs if left in numbers and right in numbers]
        found += [(scores[number], pair) for pair in sorted(pairs, key=lambda pair: [numbers[part] for part in pair])]
    return [pair for _, pair in sorted(found, key=lambda one: one[0], reverse=True)]


class GgufWeights(Weights):
    """The tensors of a GGUF file under transformers' names; see ``Weights``.

    Args:
        heads, groups: of queries, and of keys and values. llama.cpp keeps the rows of a Llama's q and k in another
            order than transformers, head by head.
    """

    def __init__(self, file: GgufFile, heads: int, groups: int):
        self.file, self.files = file, [file.path]
        self._names = {_renamed(name): name for name in file.tensors if name != FREQUENCIES}
        self.shapes = {name: file.tensors[own].shape for name, own in self._names.items()}
        kinds = {name: file.tensors[own].kind for name, own in self._names.items()}
        # Megatron wants one type of all that it keeps in one tensor; files have norms and biases in float32.
        several = len(set(kinds.values())) > 1
        self.dtypes = {name: "F32" if several else DTYPES.get(kind, "F32") for name, kind in kinds.items()}
        self._in_pairs = {}
        if file.values["general.architecture"] == "llama":
            self._in_pairs = {"attn_q.": heads, "attn_k.": groups}

    def __enter__(self) -> GgufWeights:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            UsageError: it has NaN or infinity in it, or is quantised in an unknown way.
        """
        own = self._names[name]
        tensor = self.file.read(own)
        if not all(end.isfinite() for end in tensor.aminmax()):
            raise self.file.error(f"the tensor {own} has NaN or infinity in it")
        if self.dtypes[name] == "F32":
            tensor = tensor.float()
        for part, heads in self._in_pairs.items():
            if part in own:  # its two halves of a head alternate
                tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor


def _renamed(name: str) -> str:
    """A tensor's name in transformers; one that is not known stays."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not found or found[2] not in TENSORS:
        return name
    layer = f"model.layers.{found[1]}." if found[1] else ""
    return f"{layer}{TENSORS[found[2]]}.{found[3]}"
