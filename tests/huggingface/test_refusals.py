"""Folders that are no models, or models of another kind: one line that names what it is, and nothing is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import GPT2_SIZES, SIZES, TOKENS, save
from typer.testing import CliRunner

from nemo_tiedlora.cli import app
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface import taken_over, weights
from nemo_tiedlora.huggingface.families import FAMILIES, model_config
from nemo_tiedlora.huggingface.taken_over import Model, take_over

CONFIG = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
GEMMA = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}
GPT2 = GPT2_SIZES | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(folder / "one", "llama")
    save(folder / "shards", "llama", shards="100KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A model in one file, to be damaged."""
    return shutil.copytree(saved / "one", tmp_path / "model")


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"architectures": ["Gemma2ForCausalLM"]}, r"architectures=\['Gemma2ForCausalLM'\].*LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=.*taken over: Llama 1 to 3.x"),
        ({"architectures": None}, "architectures=None"),
        ({"model_type": "gemma"}, "model_type='gemma'.* is of type llama"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map=.*not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*not known"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types="),
        (MISTRAL | {"sliding_window": 128}, "sliding_window=128.*max_position_embeddings, now 256"),
        (MISTRAL | {"max_position_embeddings": 8192}, "sliding_window=4096"),
        (QWEN2 | {"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": YARN}, "rope_scaling.rope_type='yarn'.*llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor=None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 3}}, "rope_scaling.beta=3"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention=.*each layer"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4.*6 attention heads"),
        ({"hidden_size": 47}, "hidden_size=47"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3'"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None"),
        ({"max_position_embeddings": True}, "max_position_embeddings=True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rope_theta": -1}, "rope_theta=-1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ],
)
def test_a_config_is_refused_by_its_field(changed, said):
    with pytest.raises(UsageError, match=said):
        model_config(CONFIG | changed)


@pytest.mark.parametrize(
    "config, changed, said",
    [
        (CONFIG | GEMMA, {"hidden_act": "gelu"}, "hidden_act='gelu'.*different things for it.*gelu_pytorch_tanh"),
        (CONFIG | GEMMA, {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "hidden_act='gelu'"),
        (CONFIG | GEMMA, {"hidden_activation": "gelu"}, "hidden_activation='gelu'.*only gelu_pytorch_tanh"),
        (CONFIG | GEMMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        (CONFIG | GEMMA, {"sliding_window": 64}, "sliding_window=64"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights=False"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"activation_function": "relu"}, "activation_function='relu'.*gelu_new"),
        (GPT2, {"rope_theta": 1e4}, "rope_theta=10000.0.*not known"),
        (GPT2, {"n_embd": 50}, "n_embd=50.*6 attention heads"),
        (GPT2, {"n_layer": None}, "n_layer=None"),
        (GPT2, {"layer_norm_epsilon": 0}, "layer_norm_epsilon=0"),
    ],
)
def test_gemma_and_gpt2_are_refused_by_their_own_fields(config, changed, said):
    assert model_config(config)
    with pytest.raises(UsageError, match=said):
        model_config(config | changed)


def test_what_changes_no_result_is_no_reason():
    same = {"torch_dtype": "bfloat16", "pretraining_tp": 2, "rope_scaling": None, "unheard_of": None, "head_dim": None}
    assert model_config(CONFIG | same) == model_config(CONFIG)
    assert model_config(CONFIG | MISTRAL)["max_position_embeddings"] == 256  # the window is 4096
    assert model_config(CONFIG | QWEN2 | {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 1})
    newer = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert model_config(CONFIG | newer) == model_config(CONFIG | {"rope_theta": 5e5})


def _edited(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def _weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.down_proj.weight"


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "config.json.*not readable as JSON"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json.*not a list of settings"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 99999), "config.json.*not readable"),
    "cut off": (_cut, "model.safetensors.*damaged or cut off"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickled, which could run code.*safe_serialization",
    ),
    "shape": (
        lambda folder: _edited(folder, "config.json", lambda config: config.update(intermediate_size=88)),
        r"gate_proj.weight has shape \(80, 48\); config.json says \(88, 48\)",
    ),
    "layers": (
        lambda folder: _edited(folder, "config.json", lambda config: config.update(num_hidden_layers=2)),
        "no place for its tensor model.layers.2",
    ),
    "missing tensor": (lambda folder: _weights(folder, lambda tensors: tensors.pop(NORM)), f"{NORM} is missing"),
    "own tensor": (
        lambda folder: _weights(folder, lambda tensors: tensors.update(bias=torch.ones(2))),
        "no place for its tensor bias in a LlamaForCausalLM",
    ),
    "integers": (
        lambda folder: _weights(folder, lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)})),
        f"{DOWN} is of type I8",
    ),
    "mixed": (
        lambda folder: _weights(
            folder,
            lambda tensors: tensors.update(
                {"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 48, dtype=torch.bfloat16)}
            ),
        ),
        "k_proj.weight.* are of different types, BF16, F32",
    ),
    "nan": (lambda folder: _weights(folder, lambda tensors: tensors[DOWN].view(-1)[7:8].fill_(float("nan"))), DOWN),
    "infinity": (lambda folder: _weights(folder, lambda tensors: tensors[NORM][3:4].fill_(-float("inf"))), NORM),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json in it.*save_pretrained"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not a tokenizer that can be loaded"),
    "end of text": (
        lambda folder: [
            _edited(folder, "tokenizer_config.json", lambda content: content.pop("eos_token")),
            _edited(folder, "special_tokens_map.json", lambda content: content.pop("eos_token")),
            _edited(folder, "config.json", lambda content: content.pop("eos_token_id")),
        ],
        "eos_token=None.*says which token ends a text",
    ),
    "vocabulary": (
        lambda folder: [
            _edited(folder, "config.json", lambda config: config.update(vocab_size=320)),
            _weights(folder, lambda tensors: [tensors.update({name: tensors[name][:320].clone()}) for name in (
                "model.embed_tokens.weight", "lm_head.weight")]),
        ],
        f"vocab_size=320.*the tokenizer has {TOKENS} tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_folder_is_refused_and_nothing_is_written(kind, folder, tmp_path):
    damage, said = DAMAGE[kind]
    damage(folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "base.nemo").write_bytes(b"as it was")
    with pytest.raises(UsageError, match=said):
        take_over(folder, tmp_path / "out" / "base.nemo")
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"as it was"]


def test_shards_are_looked_for_where_the_index_says(saved, tmp_path):
    folder = shutil.copytree(saved / "shards", tmp_path / "model")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.rename(tmp_path / shard.name)
    with pytest.raises(UsageError, match=f"there is no {shard.name} in it, which model.safetensors.index.json names"):
        Model(folder)
    for name in ("../other.safetensors", str(tmp_path / shard.name), "code.py"):
        _edited(folder, weights.INDEX, lambda index, name=name: index["weight_map"].update({NORM: name}))
        with pytest.raises(UsageError, match="no file beside it"):
            Model(folder)
    (folder / weights.INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(UsageError, match="weight_map does not say"):
        Model(folder)


def test_nothing_of_the_weights_is_read_before_all_of_the_config_fits(folder, monkeypatch):
    monkeypatch.setattr(taken_over, "Weights", lambda *_: pytest.fail("they are read"))
    _edited(folder, "config.json", lambda config: config.update(attention_bias=True))
    with pytest.raises(UsageError, match="attention_bias"):
        Model(folder)


def test_no_class_and_no_file_that_the_tokenizer_names_is_loaded(folder, tmp_path):
    settings = {
        "tokenizer_class": "CustomTokenizer",
        "auto_map": {"AutoTokenizer": ["code.Custom", None]},
        "tokenizer_file": "/etc/passwd",
        "name_or_path": "https://example.org",
    }
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    _edited(folder, "tokenizer_config.json", lambda content: content.update(settings))
    kept = Model(folder).settings
    assert kept["tokenizer_class"] == "PreTrainedTokenizerFast" and not {*settings} - {"tokenizer_class"} & {*kept}


def test_the_end_of_a_text_can_come_from_the_config(folder):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _edited(folder, name, lambda content: content.pop("eos_token"))
    assert Model(folder).settings["eos_token"] == "</s>"


def test_the_command_ends_in_one_line(folder, tmp_path):
    run = CliRunner().invoke
    done = run(app, ["import-hf", str(folder), "--out", str(tmp_path / "base.nemo"), "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["tokens"] == TOKENS, done.output
    for arguments, field in (
        ([str(folder), "--out", "base.bin"], "out"),
        ([str(tmp_path / "nowhere"), "--out", str(tmp_path / "a.nemo")], "model"),
    ):
        refused = run(app, ["import-hf", *arguments]).exception
        assert isinstance(refused, UsageError) and refused.field == field
    help_text = " ".join(run(app, ["import-hf", "--help"]).output.split())
    for family in FAMILIES.values():
        for word in family.models.replace(",", "").split():
            assert word in help_text, word
