"""`python tests/huggingface/peak.py FOLDER`: what memory it takes to take a model over and to give it back.

A random Llama of half a gigabyte is written to FOLDER, and each way is gone in a process of its own. What counts is how
much more the process ever held than before, mapped pages of files included; a small model goes the same way before, so
that imports do not count.
"""

import json
import subprocess
import sys
from pathlib import Path

LARGEST = 32000 * 1024 * 4


def make(folder: Path, hidden: int, vocabulary: int) -> None:
    """A model of four layers."""
    import saved_models
    import torch
    from safetensors.torch import save_file

    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 4}
    folder.mkdir()
    config = saved_models.config("llama", **sizes, num_attention_heads=8)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    saved_models.tokenizer(folder)
    ffn, keys = 3 * hidden, hidden // 4
    shapes = {f"model.{name}.weight": (hidden,) for name in ("norm", *(f"layers.{layer}.{norm}_layernorm"
              for layer in range(4) for norm in ("input", "post_attention")))}  # fmt: skip
    for layer in range(4):
        for name, shape in (
            ("self_attn.q", (hidden, hidden)), ("self_attn.k", (keys, hidden)), ("self_attn.v", (keys, hidden)),
            ("self_attn.o", (hidden, hidden)), ("mlp.gate", (ffn, hidden)), ("mlp.up", (ffn, hidden)),
            ("mlp.down", (hidden, ffn)),
        ):  # fmt: skip
            shapes[f"model.layers.{layer}.{name}_proj.weight"] = shape
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")


def measure(folder: Path, way: str) -> int:
    """Bytes that this process held more at any time than before."""
    from nemo_tiedlora.huggingface.given_back import give_back
    from nemo_tiedlora.huggingface.taken_over import take_over

    def go(size: str) -> None:
        if way == "in":
            take_over(folder / size, folder / f"{size}.nemo")
        else:
            give_back(folder / f"{size}.nemo", folder / f"{size} again")

    go("small")
    before = held()
    go("large")
    return held() - before


def held() -> int:
    """The most bytes that this process held so far. (getrusage counts those of the process that started it too.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def peaks(folder: Path) -> dict[str, float]:
    """By way, the peak in parts of the largest tensor."""
    for size, hidden, vocabulary in (("small", 64, 352), ("large", 1024, 32000)):
        make(folder / size, hidden, vocabulary)
    found = {}
    for way in ("in", "out"):
        done = subprocess.run([sys.executable, __file__, folder, way], check=True, capture_output=True, text=True)
        found[way] = json.loads(done.stdout) / LARGEST
    return found


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(Path(sys.argv[1]), sys.argv[2]))
    else:
        print(json.dumps(peaks(Path(sys.argv[1]))))
