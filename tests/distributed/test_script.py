"""The fine-tuning script under torchrun, to its end: the same curve, adapter, summary and samples as one process."""

import json
from pathlib import Path

import bases
import forked
import pytest
import toy

from nemo_tiedlora import platform

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "examples" / "megatron_gpt_finetuning.py"
WATCHED = HERE.parent / "examples" / "watched.py"
pytestmark = pytest.mark.slow

STEPS = 4
LAYOUTS = {
    "one process": (1, ()),
    "TP2": (2, ("model.tensor_model_parallel_size=2",)),
    "PP2": (2, ("model.pipeline_model_parallel_size=2",)),
    "DP2": (2, ()),
    "TP2 SP": (2, ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")),
}
#: Global and micro batch size; None: those that a user's own data have by default.
SIZES = {"accumulating": (8, 2), "default": None}
BASES = ("built-in", "Llama-like")
#: Every layout, base and size once; all of them with each other take too long.
PAIRWISE = {
    ("TP2", "Llama-like", "accumulating"),
    ("PP2", "built-in", "accumulating"),
    ("DP2", "Llama-like", "accumulating"),
    ("DP2", "built-in", "default"),
    ("TP2 SP", "built-in", "accumulating"),
}
CASES = [
    pytest.param(layout, base, sizes, marks=() if (layout, base, sizes) in PAIRWISE else pytest.mark.thorough)
    for layout in LAYOUTS
    for base in BASES
    for sizes in SIZES
    if layout != "one process"
] + [pytest.param(layout, "experts", "accumulating", marks=pytest.mark.thorough) for layout in ("PP2", "DP2", "TP2 SP")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A Llama-like base and one of experts, and rows that fill no batch."""
    folder = tmp_path_factory.mktemp("files")
    with platform.host(), toy.clean_megatron():
        tokenizer = toy.tokenizer(folder)
        base = toy.save_base(toy.llama_config(tokenizer), folder / "llama.nemo")
        experts = bases.save("experts", tokenizer, folder)
    return {
        "Llama-like": base,
        "experts": experts,
        "train": toy.sums(folder / "train.jsonl", 150),
        "validation": toy.sums(folder / "validation.jsonl", 5, seed=1),
    }


@pytest.fixture(scope="module")
def ran(files, tmp_path_factory):
    """``ran(layout, base, sizes)`` → the run's summary, and what each rank noted; of one process only once."""
    made = {}

    def run(layout, base, sizes):
        if (layout, base, sizes) not in made:
            made[layout, base, sizes] = _run(files, tmp_path_factory.mktemp("run"), layout, base, sizes)
        return made[layout, base, sizes]

    return run


def _run(files, folder, layout, base, sizes):
    processes, overrides = LAYOUTS[layout]
    batch = SIZES[sizes] and (f"model.global_batch_size={SIZES[sizes][0]}", f"model.micro_batch_size={SIZES[sizes][1]}")
    group = forked.torchrun(
        processes,
        WATCHED, "-", "-", SCRIPT,
        f"trainer.devices={processes}",
        f"trainer.max_steps={STEPS}",
        "trainer.val_check_interval=2",
        "exp_manager.exp_dir=runs",
        f"model.data.train_ds.file_names=[{files['train']}]",
        f"model.data.validation_ds.file_names=[{files['validation']}]",
        "model.data.validation_ds.global_batch_size=8",
        "model.data.validation_ds.micro_batch_size=4",
        "model.data.validation_ds.metric.name=exact_string_match",
        "model.data.validation_ds.tokens_to_generate=2",
        "model.data.train_ds.max_seq_length=64",
        "model.optim.lr=1e-2",
        "model.optim.sched.warmup_steps=1",
        *(() if base == "built-in" else (f"model.restore_from_path={files[base]}",)),
        *overrides,
        *(batch or ()),
        cwd=folder,
    )  # fmt: skip
    for rank in group:
        code, out, err = rank.finish()
        assert code == 0, err[-3000:]
    (summary,) = folder.glob("runs/*/summary.json")
    noted = [json.loads((folder / f"watched-{rank}.json").read_text()) for rank in range(processes)]
    return json.loads(summary.read_text()), noted


@pytest.mark.parametrize(("layout", "base", "sizes"), CASES)
def test_the_script_runs_to_its_end_on_the_same_curve(ran, layout, base, sizes):
    alone, (reference,) = ran("one process", base, sizes)
    summary, noted = ran(layout, base, sizes)
    for rank in noted:
        assert rank["losses"] == pytest.approx(reference["losses"], rel=1e-4)
    assert len(reference["losses"]) == STEPS
    assert summary["trainable"] == alone["trainable"] and summary["metric"] == "exact_string_match"
    assert [sample["expected"] for sample in summary["samples"]] == [sample["expected"] for sample in alone["samples"]]
    assert [sample["before"] for sample in summary["samples"]] == [sample["before"] for sample in alone["samples"]]
    assert Path(summary["adapter"]).is_file()
    ranks = 2 if layout == "DP2" else 1
    whole, piece = SIZES[sizes] or (128, 4)
    for rank in noted if layout != "PP2" else noted[:1]:  # the first stage has the embedding, where rows are counted
        assert rank["pieces"] == {str(step): [piece] * (whole // piece // ranks) for step in range(STEPS)}
    assert summary["tokens_per_second"] > 0
