"""Specs: what is refused, and that what is accepted survives JSON and YAML."""

import json
import subprocess
import sys
from copy import deepcopy

import pytest

import benchmark_suite
from benchmark_suite import declared
from nemo_tiedlora.errors import UsageError

GOOD = {
    "id": "colours-v1",
    "description": "Colours of things.",
    "source": {"name": "colours", "folder": "."},
    "prompt": "Colour of {{ thing }}:",
    "prediction": {"kind": "rank", "choices": ["red", "blue"], "label": "label|int"},
    "metrics": ["acc"],
    "recipe": {"lr": [1e-3], "steps": 10, "batch_size": 4, "max_seq_length": 32},
}


def changed(path, value):
    spec = deepcopy(GOOD)
    *sections, name = path.split(".")
    inner = spec
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return spec


@pytest.mark.parametrize("id", benchmark_suite.list_tasks())
def test_specs_survive_json_and_yaml(id, tmp_path):
    spec = benchmark_suite.spec(id)
    assert benchmark_suite.TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    (tmp_path / "spec.yaml").write_text(declared.text(spec.to_dict()))
    assert benchmark_suite.TaskSpec.from_dict(declared.read(tmp_path / "spec.yaml")) == spec


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("id", "colours", "id='colours': write a name and a version"),
        ("metrics", ["accc"], "metrics='accc': unknown metric; did you mean 'acc'?"),
        ("metrics", ["bleu"], "metrics='bleu': not for prediction.kind 'rank'; those are acc, acc_norm, f1, mcc"),
        ("metrics", [], "metrics=[]"),
        ("promt", "x", "promt='x': unknown field; did you mean 'prompt'?"),
        ("prompt", "{{ thing", "prompt='{{ thing': not valid Jinja"),
        ("prompt", "", "prompt=''"),
        ("prediction.kind", "rnk", "prediction.kind='rnk': did you mean 'rank'?"),
        ("prediction.choices", [True, False], "prediction.choices=[True, False]"),
        ("prediction.max_tokens", 3, "prediction.kind='rank': nothing is generated"),
        ("recipe.lr", ["fast"], "recipe.lr=['fast']"),
        ("recipe.lr", [-1.0], "recipe.lr=-1.0"),
        ("recipe.steps", 0, "recipe.steps=0"),
        ("recipe", {"lr": [1e-3]}, "recipe.steps=None: missing"),
        ("source.path", "x/y", "source.path='x/y': name one source"),
        ("head", {"texts": []}, "head.texts=[]: write a list of one or two templates"),
        ("head", {"texts": ["{{ a }}", "{{ b }}", "{{ c }}"]}, "write one or two templates"),
        ("head", {"texts": ["{{ thing"]}, "head.texts='{{ thing': not valid Jinja"),
        ("head", {"texts": ["{{ thing }}"], "number": "1 +"}, "head.number='1 +': not valid Jinja"),
        ("head", {"texts": ["{{ thing }}"], "number": "size"}, "metrics='acc': not for a head that says a number"),
        ("head", {"text": ["{{ thing }}"]}, "head.text=['{{ thing }}']: unknown field; did you mean 'texts'?"),
        ("source.splits", {"train": "train"}, "source.splits={'train': 'train'}: has no 'validation'"),
        ("fields", {"a": "1 +"}, "fields.a='1 +': not valid Jinja"),
    ],
)
def test_bad_specs_are_named(path, value, message):
    with pytest.raises(UsageError) as error:
        benchmark_suite.TaskSpec.from_dict(changed(path, value))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["id", "prompt", "prediction", "metrics", "recipe", "source"])
def test_missing_fields_are_named(name):
    spec = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(UsageError, match=f"{name}=None: missing"):
        benchmark_suite.TaskSpec.from_dict(spec)


def test_names_are_close_to_something():
    with pytest.raises(UsageError, match="did you mean 'gsm8k-v1'"):
        benchmark_suite.load_task("gsm8k")
    with pytest.raises(UsageError, match="did you mean 'gsm8k-v1'"):
        benchmark_suite.make("gsm8k")
    with pytest.raises(UsageError, match="did you mean 'TL6'"):
        benchmark_suite.variant("tl66")
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        benchmark_suite.list_tasks("smok")


def test_groups():
    assert benchmark_suite.list_groups() == [
        "commonsense",
        "commonsense_instruct",
        "commonsense_rank",
        "glue",
        "smoke",
        "tied_lora_paper",
    ]
    counts = {group: len(benchmark_suite.list_tasks(group)) for group in benchmark_suite.list_groups()}
    assert list(counts.values()) == [16, 8, 8, 8, 4, 5]


def test_a_name_means_one_thing():
    spec = benchmark_suite.TaskSpec.from_dict(changed("id", "colours-v7"))
    benchmark_suite.register(spec)
    benchmark_suite.register(spec)
    with pytest.raises(UsageError, match="registered already"):
        benchmark_suite.register(benchmark_suite.TaskSpec.from_dict(changed("id", "colours-v7") | {"seed": 1}))


def test_a_folder_is_added_whole_or_not_at_all(tmp_path):
    (tmp_path / "a.yaml").write_text(declared.text(changed("id", "colours-v8")))
    (tmp_path / "b.yaml").write_text(declared.text(changed("id", "gsm8k-v1")))
    with pytest.raises(UsageError, match="task='gsm8k-v1': registered already"):
        benchmark_suite.register_folder(tmp_path)
    assert "colours-v8" not in benchmark_suite.list_tasks()


def test_importing_the_suite_is_cheap():
    heavy = "('torch', 'datasets', 'sklearn', 'scipy', 'sacrebleu', 'rouge_score', 'pandas')"
    code = f"""
import sys, benchmark_suite
assert 'jinja2' not in sys.modules
benchmark_suite.list_tasks(), benchmark_suite.list_variants()
benchmark_suite.load_task('before-v1', limit=2).examples()
sys.exit(str([name for name in {heavy} if name in sys.modules] or ''))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr


@pytest.mark.parametrize("name", benchmark_suite.list_variants())
def test_the_plugin_accepts_every_variant(name):
    variant = benchmark_suite.variant(name)
    variant.check()
    assert benchmark_suite.VariantSpec.from_dict(json.loads(json.dumps(variant.to_dict()))) == variant
    if variant.is_peft:
        with pytest.raises(UsageError, match="--host hf"):
            variant.overrides()
    else:
        assert variant.overrides()[0] == f"model.peft.peft_scheme={variant.scheme}"


def test_variants_become_overrides():
    assert benchmark_suite.variant("TL6").overrides(4)[1:] == [
        "model.peft.tied_lora_tuning.preset=TL6",
        "model.peft.tied_lora_tuning.rank=4",
    ]
    assert benchmark_suite.variant("full").overrides() == ["model.peft.peft_scheme=none"]
    with pytest.raises(UsageError, match="rank=8: IA3 has none"):
        benchmark_suite.variant("IA3").overrides(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "tied_lra"}, "did you mean 'tied_lora'"),
        ({"ranks": [0]}, "ranks=0"),
        ({"ranks": []}, "name some"),
        ({"settings": {"rank": 3}}, "set it by ranks"),
        ({"settings": {"presett": "TL6"}}, "did you mean 'preset'"),
        ({"settings": {"preset": "TL9"}}, "preset='TL9'"),
        ({"scheme": "peft:veraa"}, "did you mean 'peft:vera'"),
        ({"scheme": "peft:lora", "settings": {"use_dor": True}}, "settings.use_dor=True: did you mean 'use_dora'"),
        ({"scheme": "peft:lora", "settings": {"r": 8}}, "settings.r=8: set it by ranks"),
        ({"scheme": "peft:oft", "settings": {"oft_block_size": 4}}, "PEFT refuses them: You can only specify either r"),
        ({"scheme": "peft:adalora"}, "not run here: it changes ranks"),
        ({"scheme": "peft:p_tuning"}, "not run here: it puts tokens before the text"),
    ],
)
def test_bad_variants_are_named(change, message):
    good = {"name": "mine", "description": "Mine.", "scheme": "tied_lora", "ranks": [8]}
    with pytest.raises(UsageError) as error:
        benchmark_suite.register_variant(benchmark_suite.VariantSpec.from_dict(good | change))
    assert message in str(error.value)


def test_learning_rates_are_the_most_specific():
    smoke, paper = benchmark_suite.spec("before-v1").recipe, benchmark_suite.spec("gsm8k-v1").recipe
    full, tied = benchmark_suite.variant("full"), benchmark_suite.variant("TL6")
    assert smoke.rates(tied) == [3e-2] and paper.rates(full) == [1e-5, 1e-6] and paper.rates(tied) == [1e-4, 1e-5]


def test_every_variant_of_a_recipe_exists():
    for id in benchmark_suite.list_tasks():
        assert set(benchmark_suite.spec(id).recipe.variant_lr) <= set(benchmark_suite.list_variants())
