"""Text that is learned on transformers models: to the numbers of NeMo's workbench, and leaving the base as it was."""

import json
import shutil
from dataclasses import replace

import hf_cells
import pytest
import torch
import toy
import transformers

import benchmark_suite
from benchmark_suite.backends import backend
from benchmark_suite.backends.hf import objectives
from benchmark_suite.backends.hf.backend import HfTrained
from benchmark_suite.backends.hf.fit import Copies
from nemo_tiedlora import huggingface
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface.bases import base_at
from nemo_tiedlora.huggingface.given_back import give_back

SHORT = {"steps": 8, "batch_size": 8, "max_seq_length": 56}


@pytest.mark.slow
def test_both_hosts_train_to_the_same_numbers(models, data_root, tmp_path):
    """Rows, their order, the loss, the schedule, validations, clipping, methods with a part in steps, and scores."""
    variants = ["TL6", "DynaLoRA QKV", hf_cells.LORA_PLUS]
    tasks = ["before-v1", "arc-easy-v1"]
    here, cells = hf_cells.swept(models("llama"), tmp_path / "hf", variants, tasks, data_root, **SHORT)
    with toy.clean_megatron():
        there, twins = hf_cells.swept(
            models("llama"), tmp_path / "nemo", variants, tasks, data_root, host="nemo", **SHORT
        )
    for one, other, cell, twin in zip(here, there, cells, twins, strict=True):
        assert (one["error"], other["error"]) == (None, None)
        expected = [[step, pytest.approx(loss, abs=1e-4)] for step, loss in other["validation_losses"]]
        assert one["validation_losses"] == expected
        for name in ("trainable", "stored", "percent_of_lora", "best_step", "steps", "validation", "metrics"):
            assert one[name] == other[name], name
        rows, others = (
            [json.loads(line)["prediction"] for line in (each.folder(tmp_path / host) / "predictions.jsonl").open()]
            for each, host in ((cell, "hf"), (twin, "nemo"))
        )
        assert rows == (others if cell.task.id == "before-v1" else [pytest.approx(each, abs=1e-3) for each in others])
        assert (one["host"], other["host"]) == ("hf", "nemo") and cell.hash != twin.hash


@pytest.mark.thorough
def test_both_hosts_train_a_real_model_to_the_same_numbers(data_root, tmp_path):
    try:
        give_back(base_at("smollm2"), tmp_path / "model")
    except UsageError as error:
        pytest.skip(f"the model cannot be fetched: {error}")
    recipe = {"steps": 20, "batch_size": 4, "max_seq_length": 64, "val_interval": 10}
    what = tmp_path / "model", tmp_path, ["TL6"], ["sst2-v1"], data_root
    (here,), _ = hf_cells.swept(*what, **recipe)
    with toy.clean_megatron():
        (there,), _ = hf_cells.swept(*what, host="nemo", **recipe)
    expected = [[step, pytest.approx(loss, abs=1e-4)] for step, loss in there["validation_losses"]]
    assert here["validation_losses"] == expected and here["metrics"] == there["metrics"]


def test_nothing_is_left_of_a_cell_and_the_same_cell_is_the_same_again(models, tmp_path):
    variants = ["TL6", "full", "PEFT LoRA", "DynaLoRA"]
    first, _ = hf_cells.swept(models("llama"), tmp_path / "a", variants, ["before-v1"], **SHORT)
    assert [result["error"] for result in first] == [None] * 4
    again, _ = hf_cells.swept(models("llama"), tmp_path / "b", variants[::-1], ["before-v1"], **SHORT)
    losses = [[result["validation_losses"] for result in found] for found in (first, again[::-1])]
    assert losses[0] == losses[1]


def test_bfloat16_learns_as_float32_does(models, tmp_path):
    variants, recipe = ["TL6", "DynaLoRA", "PEFT LoRA"], SHORT | {"steps": 16, "warmup_steps": 0}
    found, _ = hf_cells.swept(models("llama"), tmp_path, variants, ["before-v1"], precision="bf16", **recipe)
    precise, _ = hf_cells.swept(models("llama"), tmp_path, variants, ["before-v1"], **recipe)
    for one, other in zip(found, precise, strict=True):
        assert one["error"] is None
        first, last = other["validation_losses"][0][1], other["validation_losses"][-1][1]
        assert last < first and one["validation_losses"][-1][1] == pytest.approx(last, abs=(first - last) / 4)


@torch.no_grad()
def test_the_optimizer_keeps_float32_of_what_bfloat16_rounds_away():
    tensor = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    copies = Copies([{"params": [tensor], "name": "kept"}])
    (group,) = copies.groups
    assert group["name"] == "kept" and group["params"][0].dtype == torch.float32
    for _ in range(8):
        tensor.grad = torch.full_like(tensor, 0.25)
        assert float(copies.gather()) == pytest.approx(0.25 * 3**0.5)
        group["params"][0] -= 0.001
        copies.give()
    assert tensor.tolist() == pytest.approx([0.992] * 3, abs=0.003) and tensor.grad is None


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def trained(models, request):
    """The plain model, as cells are tried on it."""
    folder = backend("hf", models(request.param)).folder
    return HfTrained(folder.load(None, "32"), folder, None, None, 64)


TEXTS = ["In line: Kate Leo Ida.", "Who", "A much longer prompt than the others are, by far, and with more words."]


def test_texts_and_likelihoods_are_those_of_one_at_a_time(trained):
    model, tokenizer = trained.model, trained.folder.tokenizer
    spare = len(tokenizer)  # rows beyond are no tokens
    together = trained.generate(TEXTS, tokens=6)
    pairs = [(text, f" {answer}") for text in TEXTS for answer in ("Leo", "no one at all")]
    likely = trained.log_likelihoods(pairs)
    for text, said in zip(TEXTS, together, strict=True):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, model(ids).logits[:, -1:, :spare].argmax(-1)], 1)
        new = ids[0, -6:].tolist()
        new = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        assert said == tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for (context, continuation), (value, greedy) in zip(pairs, likely, strict=True):
        ids = tokenizer(context + continuation, add_special_tokens=False, return_tensors="pt").input_ids
        start = len(tokenizer(context, add_special_tokens=False).input_ids)
        with torch.no_grad():
            scores = torch.log_softmax(model(ids).logits[0, start - 1 : -1].double(), -1)
        assert value == pytest.approx(float(scores.gather(1, ids[0, start:, None]).sum()), abs=1e-4)
        assert greedy == bool((scores.argmax(1) == ids[0, start:]).all())


def test_text_is_trained_without_dropout_and_sampling_settings_are_left_out(models, tmp_path):
    folder = shutil.copytree(models("gpt2"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "repetition_penalty": 3.0}))
    model = backend("hf", folder).folder.load(None, "32")
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert not model.generation_config.do_sample and model.generation_config.repetition_penalty == 1.0


def test_what_does_not_fit_the_context_loses_its_beginning(trained):
    long, context = "word " * 200, trained.folder.context
    ids = trained.folder.tokenizer(long, add_special_tokens=False).input_ids
    assert len(ids) > context
    kept = trained.folder.tokenizer.decode(ids[-(context - 4) :])
    assert trained.generate([long], tokens=4) == trained.generate([kept], tokens=4)
    ((value, _),) = trained.log_likelihoods([(long, " no")])
    assert -40 < value < 0
    assert isinstance(*trained.generate([""], tokens=2), str)


def test_scores_of_the_vocabulary_are_computed_where_an_answer_is_and_few_at_a_time(trained, monkeypatch):
    monkeypatch.setattr("benchmark_suite.backends.hf.backend.POSITIONS", 4)
    shapes = []
    hook = trained.model.get_output_embeddings().register_forward_hook(lambda *given: shapes.append(given[2].shape))
    pairs = [(text, answer) for text in TEXTS for answer in (" a", " b")]
    found = trained.log_likelihoods(pairs)
    hook.remove()
    monkeypatch.undo()
    assert max(shape[0] for shape in shapes) <= 4 and all(len(shape) == 2 for shape in shapes)
    assert found == [(pytest.approx(value, abs=1e-4), same) for value, same in trained.log_likelihoods(pairs)]


def test_a_batch_in_pieces_has_the_same_loss_and_gradient(models, tmp_path, monkeypatch):
    whole, _ = hf_cells.swept(models("llama"), tmp_path / "whole", ["TL6"], ["before-v1"], **SHORT)
    monkeypatch.setattr(objectives, "POSITIONS", 5)
    pieces, _ = hf_cells.swept(models("llama"), tmp_path / "pieces", ["TL6"], ["before-v1"], **SHORT)
    for (_, loss), (_, other) in zip(whole[0]["validation_losses"], pieces[0]["validation_losses"], strict=True):
        assert loss == pytest.approx(other, abs=1e-5)


def test_an_adapter_that_was_kept_computes_what_was_tested(models, data_root, tmp_path):
    (found,), (cell,) = hf_cells.swept(models("llama"), tmp_path, ["TL6"], ["arc-easy-v1"], data_root, **SHORT)
    folder = cell.folder(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(models("llama")).eval()
    adapter = huggingface.load(model, folder / "adapter")
    assert sum(tensor.numel() for tensor in adapter.named_tensors().values()) == found["trainable"]
    kept = [path for path in (folder / "adapter").iterdir() if path.name != "README.md"]
    assert sum(path.stat().st_size for path in kept) == found["adapter_bytes"]
    on = backend("hf", models("llama")).folder
    example = hf_cells.sweeping.tasks_named(["arc-easy-v1"], data_root, None)["arc-easy-v1"].examples("test")[0]
    likely = HfTrained(model, on, None, None, 64).log_likelihoods(example.queries)
    (row,) = (json.loads(line) for line in (folder / "predictions.jsonl").open())
    assert row["prediction"] == pytest.approx([value for value, _ in likely], abs=1e-4)


def test_a_vision_language_model_is_trained_as_the_decoder_in_it(models, tmp_path):
    variants = ["TL6", "ShareLoRA", "PEFT LoRA"]
    found, cells = hf_cells.swept(models("llava"), tmp_path, variants, ["before-v1"], **SHORT)
    assert [result["error"] for result in found] == [None] * 3
    assert all(result["validation_losses"][-1][1] < result["validation_losses"][0][1] for result in found)
    kept = (cells[0].folder(tmp_path) / "adapter" / "adapter_config.json").read_text()
    assert "language_model" in kept and "vision" not in kept


def test_rows_end_where_the_models_positions_do(models):
    on = backend("hf", models("gpt2"))
    rows = [benchmark_suite.Example("1", "word " * 200, "yes", ("yes",))]
    recipe = replace(benchmark_suite.spec("before-v1").recipe, max_seq_length=4096)
    training = hf_cells.Training(benchmark_suite.variant("TL6"), 4, rows, rows, recipe, 1e-2, 0, None)
    (row,) = on._objective(None, training).train
    assert len(row.ids) == on.folder.context == 256 and row.ids[-1] == on.folder.tokenizer.eos_token_id
    assert on.folder.tokenizer.decode(row.ids[row.start : -1]) == " yes"
