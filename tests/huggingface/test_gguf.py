"""A GGUF file as a base: the model and the tokenizer that were put into it; or one line that says why not."""

import inspect
import struct
import sys

import gguf
import gguf_files
import pytest
import sentencepiece
import torch
import toy
import transformers
from gguf_files import TYPES
from saved_models import SIZES, TEMPLATE, save
from transformers.convert_slow_tokenizer import TikTokenConverter

from nemo_tiedlora.embedded import base as embedded_base
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.gguf_file import GgufFile
from nemo_tiedlora.huggingface.gguf_model import CUTS, GgufModel, GgufWeights
from nemo_tiedlora.huggingface.taken_over import Model, take_over
from nemo_tiedlora.job.generate import generator

#: Rows of what is quantised are multiples of 32.
WIDE = {"hidden_size": 96, "intermediate_size": 160}
TEXTS = [
    "what is 3 plus 14?", "  it  is 7. \n\nIt's ÄÖ 12345!", "<s><|im_start|>user\nwhat?<|im_end|>\n", "x" * 40,
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama of 331 tokens and five more rows, and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    return save(folder, "llama", **WIDE), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def written(saved, tmp_path):
    """Write the Llama with changes; give the file's path."""

    def write(**changed):
        gguf_files.write(tmp_path / "model.gguf", *saved, **changed)
        return tmp_path / "model.gguf"

    return write


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", TYPES.Q4_1), ("llama", TYPES.BF16), ("qwen2", TYPES.Q8_0), ("qwen3", TYPES.F32)]
)
def test_nemo_computes_what_is_in_the_file(name, kind, tmp_path):
    reference = save(tmp_path / "saved", name, **WIDE)
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    gguf_files.write(tmp_path / "tiny.gguf", reference, own, kind)
    if name != "qwen3":  # which transformers cannot read
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="tiny.gguf", torch_dtype=torch.float32
        )
    facts = take_over(tmp_path / "tiny.gguf", tmp_path / "base.nemo")
    assert facts["types"] == "F32" and facts["parameters"] == reference.num_parameters()
    with toy.clean_megatron(), generator(tmp_path / "base.nemo") as loaded:
        ids = torch.randint(331, (2, 100), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = reference(ids).logits
            logits = loaded.model.model(ids.cuda(), torch.arange(100).expand_as(ids).cuda(), None).cpu()
        assert expected.std() > 0.5
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        ours = loaded.model.tokenizer
        assert [ours.text_to_ids(text) for text in TEXTS] == [own.encode(text) for text in TEXTS]
        assert [ours.ids_to_text(own.encode(text)) for text in TEXTS[:2]] == TEXTS[:2]
        assert (ours.bos_id, ours.eos_id, ours.tokenizer.chat_template) == (1, 2, TEMPLATE)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_positions_of_newer_llamas_are_found_in_their_divisors(factor, tmp_path):
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = save(tmp_path / "saved", "llama", **WIDE, head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    plain = 5e5 ** (-torch.arange(0, 64, 2) / 64)
    divisors = plain / model.model.rotary_emb.inv_freq
    assert len(divisors.unique()) > 3 and divisors.max() == pytest.approx(factor)
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    changed = {"llama__attention__key_length": 64, "tensors": {"rope_freqs.weight": divisors}}
    gguf_files.write(tmp_path / "model.gguf", model, own, **changed)
    read, expected = GgufModel(tmp_path / "model.gguf").config, Model(tmp_path / "saved").config
    for name in ("rotary_base", "kv_channels", "scale_factor", "old_context_len", "scale_positional_embedding"):
        assert read[name] == expected[name]
    assert (read["low_freq_factor"], read["high_freq_factor"]) == (1.0, 4.0)


def test_weights_of_one_type_keep_it_and_the_rest_is_exact_in_float32(written, saved):
    model = GgufModel(written(kind=TYPES.Q4_1))
    (quantised,) = [tensor for tensor in gguf.GGUFReader(model.folder).tensors if tensor.name == "blk.1.ffn_up.weight"]
    expected = torch.from_numpy(gguf.dequantize(quantised.data, quantised.tensor_type))
    assert torch.equal(model.weights.read("model.layers.1.mlp.up_proj.weight"), expected)
    file = GgufFile(written(kind=TYPES.F16))
    assert torch.equal(file.read("blk.0.ffn_gate.weight"), saved[0].model.layers[0].mlp.gate_proj.weight.half())
    assert file.read("blk.0.attn_norm.weight").dtype == torch.float32


def _made(values, tokens, unknown="<unk>"):
    model = object.__new__(GgufModel)
    model.file = type("File", (), {"values": {f"tokenizer.ggml.{name}": value for name, value in values.items()}})
    return model._made_tokenizer(tokens, unknown)


def test_sentencepiece_tokenizers_cut_texts_as_sentencepiece_does():
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(embedded_base.FOLDER / embedded_base.TOKENIZER))
    tokens = [pieces.id_to_piece(number) for number in range(pieces.vocab_size())]
    scores = [pieces.get_score(number) for number in range(pieces.vocab_size())]
    made = _made({"model": "llama", "scores": scores}, tokens)
    for text in ("In line: Emma Ben Vera Leo. Before Vera comes", "a b  c", "12 more"):
        ids = made.encode(text).ids
        assert ids == pieces.encode(text) and made.decode(ids) == text


def test_texts_are_cut_into_words_as_the_file_says(saved):
    def words(cut):
        vocabulary = [*sorted(saved[1].get_vocab(), key=saved[1].get_vocab().get), "ab"]
        return [word for word, _ in _made({"model": "gpt2", "pre": cut, "merges": ["a b"]}, vocabulary)
                .pre_tokenizer.pre_tokenize_str("It'S 12345 ok")]  # fmt: skip

    assert words("gpt-2") == ["It", "'", "S", "Ġ12345", "Ġok"]
    assert words("smollm") == ["It", "'", "S", "Ġ", "1", "2", "3", "4", "5", "Ġok"]
    assert words("qwen2") == ["It", "'S", "Ġ", "1", "2", "3", "4", "5", "Ġok"]
    assert words("llama-bpe") == ["It", "'S", "Ġ", "123", "45", "Ġok"]
    assert CUTS["llama-bpe"] == inspect.signature(TikTokenConverter).parameters["pattern"].default


REFUSED = {
    "architecture": ({"general__architecture": "gemma2"}, "general.architecture='gemma2': in model.gguf.*llama"),
    "experts": ({"llama__expert_count": 8}, "llama.expert_count=8: in model.gguf; not known"),
    "head": ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count=8: in model.gguf; only 16"),
    "vocabulary": ({"llama__vocab_size": 335}, "llama.vocab_size=335: in model.gguf; only 336"),
    "rope": ({"llama__rope__scaling__type": "yarn"}, "rope_scaling.rope_type='yarn': in model.gguf"),
    "rope tensor": ({"tensors": {"rope_freqs.weight": torch.ones(8)}}, "its rope_freqs.weight is not that of a Llama"),
    "tensor": ({"tensors": {"blk.0.attn_sinks.weight": torch.ones(8)}}, "no place for its tensor blk.0.attn_sinks"),
    "layers": ({"llama__block_count": 2}, "no place for its tensor model.layers.2"),
    "shape": ({"llama__feed_forward_length": 96}, r"has shape \(160, 96\); model.gguf says \(96, 96\)"),
    "no size": ({"llama__embedding_length": None}, "hidden_size=None: in model.gguf"),
    "words": ({"tokenizer__ggml__pre": "deepseek-llm"}, "tokenizer.ggml.pre='deepseek-llm'.*llama-bpe"),
    "tokenizer": ({"tokenizer__ggml__model": "bert"}, "tokenizer.ggml.model='bert'.*gpt2 and llama"),
    "no tokens": ({"tokenizer__ggml__tokens": None}, "no tokenizer.ggml.tokens in it"),
    "merges": ({"tokenizer__ggml__merges": ["a nowhere"]}, "its tokenizer cannot be read"),
    "end": ({"tokenizer__ggml__eos_token_id": 999}, "no tokenizer.ggml.eos_token_id"),
    "types": ({"tokenizer__ggml__token_type": [1, 1]}, "do not fit their types"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_is_refused_before_its_weights_are_read(kind, written, monkeypatch, tmp_path):
    changed, said = REFUSED[kind]
    path = written(**changed)
    monkeypatch.setattr(GgufWeights, "read", lambda *_: pytest.fail("they are read"))
    with pytest.raises(UsageError, match=said) as error:
        take_over(path, tmp_path / "base.nemo")
    assert "\n" not in str(error.value) and not (tmp_path / "base.nemo").exists()


def test_what_is_not_finite_is_refused_by_name(written, saved, tmp_path):
    path = written()
    start = GgufFile(path).tensors["blk.2.ffn_down.weight"].start
    with path.open("r+b") as file:
        file.seek(start + 40)
        file.write(struct.pack("<f", float("nan")))
    with pytest.raises(UsageError, match="blk.2.ffn_down.weight has NaN or infinity"):
        take_over(path, tmp_path / "base.nemo")
    assert not (tmp_path / "base.nemo").exists()


def test_a_file_cut_off_anywhere_or_with_any_number_in_it_ends_in_one_line(written, tmp_path):
    whole = written(kind=TYPES.Q8_0).read_bytes()
    begin = GgufFile(tmp_path / "model.gguf").tensors["token_embd.weight"].start
    damaged = [whole[:length] for length in (0, 3, 7, 20, 500, begin - 10, begin + 10, len(whole) - 1)]
    damaged += [whole[:at] + b"\xff" * 7 + whole[at + 7 :] for at in (0, 4, 9, 17, 24, 60, 100, 400)]
    damaged += [whole[:8] + struct.pack("<QQ", *counts) + whole[24:] for counts in ((2**62, 3), (3, 2**62), (0, 0))]
    for content in damaged:
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.gguf") as error:
            GgufModel(tmp_path / "bad.gguf")
        assert "\n" not in str(error.value)


def test_quantised_weights_take_a_package(written, monkeypatch):
    path, plain = written(kind=TYPES.Q4_1), None
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"model\.gguf.*quantised.*pip install gguf"):
        GgufModel(path)
    monkeypatch.undo()
    plain = written(kind=TYPES.F16)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert GgufModel(plain).tokens == SIZES["vocab_size"]
