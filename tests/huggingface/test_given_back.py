"""A base as a folder of transformers: bit by bit the model it was made of, or one with the same logits."""

import io
import json
import random
import re
import tarfile

import pytest
import saved_models
import sentencepiece
import tokenizers
import torch
import toy
import transformers
from safetensors.torch import load_file
from saved_models import MODELS, TOKENS, save
from typer.testing import CliRunner

from nemo_tiedlora.cli import app
from nemo_tiedlora.embedded.base import base as built_in
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface import sentencepieces
from nemo_tiedlora.huggingface.families import FAMILIES, model_config
from nemo_tiedlora.huggingface.given_back import give_back, hf_config
from nemo_tiedlora.huggingface.meaning import meaning
from nemo_tiedlora.huggingface.record import RECORD
from nemo_tiedlora.huggingface.taken_over import Model, take_over
from nemo_tiedlora.job.generate import generator
from nemo_tiedlora.model.archive import entry
from nemo_tiedlora.model.config import nemo_config
from nemo_tiedlora.model.data import ModelConfig

#: The class of each of the models.
ARCHITECTURES = {
    name: next(found for found, family in FAMILIES.items() if family.kind == saved_models.config(name).model_type)
    for name in MODELS
}
CHAT = [{"role": "user", "content": "what is 1 plus 2?"}]


@pytest.mark.parametrize("name", MODELS)
def test_what_was_taken_over_comes_back_bit_by_bit(name, tmp_path):
    dtype = {"qwen2": torch.bfloat16, "gemma": torch.bfloat16, "gpt2": torch.float16}.get(name, torch.float32)
    save(tmp_path / "saved", name, dtype, shards="100KB" if name == "gpt2" else "5GB")
    before = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        before |= load_file(file)
    take_over(tmp_path / "saved", tmp_path / "base.nemo", 64)
    facts = give_back(tmp_path / "base.nemo", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert facts["parameters"] == sum(tensor.numel() for tensor in before.values())
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == dtype and torch.equal(after[key], tensor), key
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((tmp_path / "saved" / file).read_text())
    old, new = (transformers.AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("saved", "out"))
    text = "<s>what is 3 plus 4?</s> <|im_start|>x  y\n"
    assert new(text).input_ids == old(text).input_ids
    assert new.apply_chat_template(CHAT) == old.apply_chat_template(CHAT)
    assert new.special_tokens_map == old.special_tokens_map
    assert list(new(text)) == ["input_ids", "attention_mask"]  # all of which generate() takes


def same_logits(base, folder):
    """NeMo's logits of ``base`` are those of the model that transformers loads from ``folder``."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with toy.clean_megatron(), generator(base) as loaded:
        ids = torch.randint(TOKENS, (2, 50), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = reference(ids).logits
            logits = loaded.model.model(ids.cuda(), torch.arange(50).expand_as(ids).cuda(), None).cpu()
        assert expected.std() > 0.3
        torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)


def test_the_built_in_base_is_a_llama_with_its_tokenizer(tmp_path):
    facts = give_back(built_in(), tmp_path / "out")
    assert facts["architecture"] == "LlamaForCausalLM" and facts["tokenizer"]
    same_logits(built_in(), tmp_path / "out")
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with tarfile.open(built_in()) as tar:
        model = next(tar.extractfile(name).read() for name in tar.getnames() if name.endswith("tokenizer.model"))
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("", "\n", "The dog sees a cat.\n\nWhat does  it see?", " Ünï 世界 🙂\t", "a" * 50, "<0x41> ▁ </ s>"):
        ids = own(text).input_ids
        assert ids == reference.encode(text) and own.decode(ids) == reference.decode(ids), text
    assert list(own("a")) == ["input_ids", "attention_mask"]
    assert own.eos_token_id == reference.eos_id() and own.pad_token_id == reference.pad_id()
    again = take_over(tmp_path / "out", tmp_path / "again.nemo")  # a model like any other now
    assert (again["tokens"], again["parameters"]) == (704, facts["parameters"])


#: What a base's config says, where transformers computes something else or nothing.
OTHERS = {
    "rotary_percentage": 0.5, "normalization": "layernorm1p", "bias": True, "activation": "squared-relu",
    "mcore_gpt": False, "num_moe_experts": 8, "apply_embedding_scaling": True, "rotary_interleaved": True,
    "mcore_customization_config": {"final_logit_softcapping": 30.0}, "position_embedding_type": "learned_absolute",
    "layernorm_zero_centered_gamma": True, "openai_gelu": True, "name": "modelopt",
}  # fmt: skip


@pytest.mark.parametrize("field", OTHERS)
def test_a_base_that_no_family_computes_is_refused_by_its_field(field):
    config = nemo_config(built_in(), "base")
    assert hf_config(config)["model_type"] == "llama"
    with pytest.raises(UsageError, match="no family of transformers computes that") as error:
        hf_config(ModelConfig({**config, field: OTHERS[field]}))
    assert error.value.field == {"openai_gelu": "activation"}.get(field, field)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_follows_from_the_fields_as_well(name):
    """Of a base that records nothing, the config is another, and the model the same."""
    config = ModelConfig(model_config(saved_models.config(name).to_dict() | {"architectures": [ARCHITECTURES[name]]}))
    derived = hf_config(config)
    assert meaning(ModelConfig(model_config(derived))) == meaning(config)
    assert derived["architectures"] == [ARCHITECTURES[name].replace("Mistral", "Llama")]
    type(saved_models.config(name)).from_dict(derived | {"vocab_size": 336})


def test_a_record_that_is_not_of_this_base_is_refused(tmp_path):
    save(tmp_path / "saved", "gpt2")
    take_over(tmp_path / "saved", tmp_path / "base.nemo")
    config = nemo_config(tmp_path / "base.nemo", "base")
    assert hf_config(config) == json.loads((tmp_path / "saved" / "config.json").read_text())
    for change, said in (
        ({"layernorm_epsilon": 0.1}, "layernorm_epsilon=0.1: in the base's config; the config.json that is recorded"),
        ({RECORD: {"config.json": "[1]"}}, "huggingface=.*not the content of a config.json"),
        ({RECORD: {"config.json": "{"}}, "huggingface="),
        ({RECORD: "x"}, "huggingface="),
        ({RECORD: {"config.json": json.dumps(saved_models.GPT2_SIZES)}}, "architectures=None"),
    ):
        changed = config.copy()
        changed.update(change)
        with pytest.raises(UsageError, match=said):
            hf_config(changed)


def test_what_a_file_says_is_kept_as_text(tmp_path):
    save(tmp_path / "saved", "llama")
    path = tmp_path / "saved" / "config.json"
    odd = {"_name_or_path": "${oc.env:HOME} \u00fc", "task_specific_params": {"_target_": "os.system", "cls": None}}
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    take_over(tmp_path / "saved", tmp_path / "base.nemo")
    give_back(tmp_path / "base.nemo", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(path.read_text())


def test_bad_input_ends_in_one_line_and_leaves_nothing(tmp_path):
    save(tmp_path / "saved", "llama")
    take_over(tmp_path / "saved", tmp_path / "base.nemo")
    content = (tmp_path / "base.nemo").read_bytes()
    (tmp_path / "cut.nemo").write_bytes(content[: len(content) // 2])
    norm = load_file(tmp_path / "saved" / "model.safetensors")["model.norm.weight"].numpy().tobytes()
    (tmp_path / "nan.nemo").write_bytes(content.replace(norm, b"\xff" * len(norm)))
    adapter = tmp_path / "adapter.nemo"
    with tarfile.open(adapter, "w") as tar:
        for name in ("model_config.yaml", "adapter_config.json", "adapter_model.safetensors"):
            tar.addfile(entry(name, 2), io.BytesIO(b"{}"))
    before = sorted(tmp_path.iterdir())
    for base, out, said in (
        ("base.nemo", "saved", "out=.*saved.*something there already"),
        ("base.nemo", "base.nemo", "out=.*something there already"),
        ("base.nemo", "base.nemo/out", "out=.*cannot be written"),
        ("nowhere.nemo", "out", "base=.*no such file"),
        ("cut.nemo", "out", "base=.*cut off"),
        ("nan.nemo", "out", "base=.*decoder.final_layernorm.weight in it has NaN"),
        ("adapter.nemo", "out", "base=.*an adapter, not a base"),
    ):
        refused = CliRunner().invoke(app, ["export-hf", str(tmp_path / base), "--out", str(tmp_path / out)]).exception
        assert isinstance(refused, UsageError), (base, refused)
        assert re.search(said, str(refused)), str(refused)
        assert sorted(tmp_path.iterdir()) == before
    done = CliRunner().invoke(app, ["export-hf", str(tmp_path / "base.nemo"), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["architecture"] == "LlamaForCausalLM"


#: How sentencepiece is trained, and whether a ``tokenizer.json`` can do the same.
SENTENCEPIECES = {
    "bytes": ({"model_type": "bpe", "byte_fallback": True}, True),
    "no beginning": ({"model_type": "bpe", "add_dummy_prefix": False, "byte_fallback": True, "pad_id": 3}, True),
    "unigram": ({"model_type": "unigram"}, True),
    "its own": ({"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": ["<chat>", "=="]}, True),
    "suffix": ({"model_type": "unigram", "treat_whitespace_as_suffix": True}, False),
    "words": ({"model_type": "word"}, False),
}


@pytest.mark.parametrize("kind", SENTENCEPIECES)
def test_a_sentencepiece_tokenizer_is_converted_where_that_does_the_same(kind):
    settings, same = SENTENCEPIECES[kind]
    model = io.BytesIO()
    corpus = [f"What is {a} plus {b}? The {'answer' * (a % 2)} is: {a + b}, (so)." for a in range(40) for b in range(9)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, vocab_size=320, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, **settings,
    )  # fmt: skip
    made, facts = sentencepieces.converted(model.getvalue())
    assert (made is not None) == same
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    if not same:
        assert facts["vocab_size"] == len(reference) and facts["eos_token_id"] == reference.eos_id()
        return
    ours = tokenizers.Tokenizer.from_str(made.decode())
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices("aehisntwpluWT 0123?:.\n\u00fc\u4e16", k=20)) + draw.choice(corpus)
        assert ours.encode(text, add_special_tokens=False).ids == reference.encode(text), text
    for damaged in (b"", b"\x0a", model.getvalue()[:-9], b"no model"):
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            sentencepieces.converted(damaged)


def _another_norm(parts):
    norm = next(part for part in parts if part.name == "decoder.final_layernorm.weight")
    return [*parts, norm._replace(name="decoder.layers.another_norm.weight", layer=0)]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda parts: parts[:-1], "there is no output_layer.weight in it"),
        (lambda parts: [part for part in parts if "fc2.weight" not in part.name or part.layer != 1], "linear_fc2"),
        (_another_norm, "no place for its tensor decoder.layers.another_norm.weight"),
        (
            lambda parts: [part._replace(layer=0) if part.name.startswith("embedding") else part for part in parts],
            "not all of embedding.word_embeddings.weight is in it",
        ),
    ],
)
def test_the_tensors_of_a_base_must_be_those_of_its_config(change, said, tmp_path):
    save(tmp_path / "saved", "llama")
    model = Model(tmp_path / "saved")
    model.parts = change(model.parts)
    model.write(tmp_path / "base.nemo")
    with pytest.raises(UsageError, match=said):
        give_back(tmp_path / "base.nemo", tmp_path / "out")
    assert not (tmp_path / "out").exists()
