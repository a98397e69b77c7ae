"""What torch, safetensors and the extra hf are enough for. Run in an environment that has no more, in an empty folder
with ``page.md``: a page whose first lines in Python are run."""

import re
from pathlib import Path

import saved_models
import torch
import transformers

from nemo_tiedlora import huggingface
from nemo_tiedlora.cli import app


def tiedlora(*arguments):
    """The command, in this process."""
    try:
        app(list(map(str, arguments)))
    except SystemExit as ended:
        assert not ended.code, arguments


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


saved_models.save(Path("saved"), "llama")
model = load("saved")
input_ids = torch.randint(saved_models.TOKENS, (2, 20), generator=torch.Generator().manual_seed(0))
scope = {"model": model, "torch": torch, "input_ids": input_ids}
exec(re.search(r"```python\n(.*?)```", Path("page.md").read_text(encoding="utf-8"), re.DOTALL)[1], scope)
rows = [{"input_ids": row, "labels": row} for row in input_ids]
args = transformers.TrainingArguments(
    "run", max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
)
other = huggingface.attach(load("saved"), "dyna_lora", ["q_proj"], rank=2)
optimizer = torch.optim.AdamW(other.parameter_groups(lr=1e-3))
trainer = transformers.Trainer(other.model, args, train_dataset=rows, optimizers=(optimizer, None),
                               callbacks=[other.callback()])  # fmt: skip
trainer.train()
assert other.variant.step == 2

with torch.no_grad():
    adapted = model(input_ids).logits
    assert not torch.equal(adapted, scope["plain"])
    assert torch.equal(load("merged")(input_ids).logits, adapted)

    # The same as NeMo's side does it, in its files.
    attached = huggingface.load(load("saved"), "adapter")
    attached.save("adapter.nemo")
    tiedlora("inspect", "adapter.nemo")
    tiedlora("import-hf", "saved", "--out", "base.nemo")
    tiedlora("merge", "--base", "base.nemo", "--adapter", "adapter.nemo", "--out", "merged.nemo")
    tiedlora("export-hf", "merged.nemo", "--out", "merged-folder")
    torch.testing.assert_close(load("merged-folder")(input_ids).logits, adapted, atol=1e-4, rtol=1e-4)
    tiedlora("export", "adapter.nemo", "--base", "saved", "--out", "peft")
    tiedlora("import-peft", "peft", "--base", "saved", "--out", "imported.nemo")
    model = load("saved")
    huggingface.load(model, "imported.nemo")
    torch.testing.assert_close(model(input_ids).logits, adapted, atol=1e-4, rtol=1e-4)
tiedlora("export-hf", "builtin", "--out", "builtin")  # its tokenizer is of sentencepiece
assert Path("builtin/tokenizer.json").is_file()
