"""Adapters of several methods, trained by the command, exported by the command, and served by vLLM beside the base.

``make test-serving`` makes vLLM's environment and names its Python in ``SERVING_PYTHON``.
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from importlib import metadata
from pathlib import Path

import pytest
import torch
import toy
import transformers
from huggingface import saved_models

from nemo_tiedlora.huggingface.export import size_of
from nemo_tiedlora.job.generate import generator

PYTHON = os.environ.get("SERVING_PYTHON")
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: make test-serving"),
]
HERE = Path(__file__).parent
ENVIRONMENT = toy.FRESH | {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
}  # fmt: skip
#: Name → the scheme, its settings, and the number of ranks that train it.
ADAPTERS = {
    "TL6": ("tied_lora", ["preset=TL6", "target_modules=[all]"], 2),
    "ShareLoRA": ("share_lora", ["groups=odd_even", "target_modules=[attention_qkv,mlp_fc1]"], 1),
    "CondLoRA": ("cond_lora", ["target_modules=[attention_q,attention_v]"], 2),
    "DynaLoRA": ("dyna_lora", ["inner=lora", "active=2", "target_modules=[all]"], 1),
}
TOKENS = 16


def tiedlora(*arguments, ranks=1, cwd=None):
    """Run the command as a user would; return what it prints."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "nemo_tiedlora", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tiny(folder):
    """A random Llama of a size that vLLM's kernels have; the base made of it."""
    saved_models.save(
        folder / "saved", "llama", hidden_size=128, intermediate_size=192, num_attention_heads=4, head_dim=64,
        num_key_value_heads=2, num_hidden_layers=4, max_position_embeddings=256,
    )  # fmt: skip
    tiedlora("import-hf", folder / "saved", "--out", folder / "base.nemo")
    return folder / "base.nemo"


def smollm2(folder):
    """A real language model."""
    tiedlora("export-hf", "smollm2", "--out", folder / "saved")
    return "smollm2"


#: Name → what puts the model into a folder and names its base, the learning rate, and over what two ranks share it:
#: SmolLM2 has nine heads.
BASES = {"tiny": (tiny, "1e-2", "tensor"), "smollm2": (smollm2, "2e-3", "pipeline")}


@pytest.fixture(scope="module", params=BASES)
def served(request, tmp_path_factory):
    """A folder with ``saved``, adapters trained on ``base``, and each as PEFT's; ``base``; and the name of the case."""
    folder = tmp_path_factory.mktemp(request.param)
    make, rate, layout = BASES[request.param]
    base = make(folder)
    draw = random.Random(1)
    for file, rows in ("train", 200), ("validation", 8):
        lines = [{"input": f"what is {a} plus {b}?", "output": f"it is {a * b}."} for a, b in
                 ((draw.randint(1, 50), draw.randint(1, 20)) for _ in range(rows))]  # fmt: skip
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, (scheme, settings, ranks) in ADAPTERS.items():
        peft = "model.peft"
        tiedlora(
            "finetune", f"model.restore_from_path={base}", f"{peft}.peft_scheme={scheme}",
            *(f"{peft}.{scheme}_tuning.{setting}" for setting in settings), f"{peft}.{scheme}_tuning.rank=8",
            f"model.data.train_ds.file_names=[{folder / 'train.jsonl'}]",
            f"model.data.validation_ds.file_names=[{folder / 'validation.jsonl'}]",
            "model.data.train_ds.max_seq_length=64", "model.global_batch_size=8", "model.micro_batch_size=4",
            f"model.optim.lr={rate}", "trainer.max_steps=20", "trainer.val_check_interval=20",
            f"model.{layout}_model_parallel_size={ranks}", f"trainer.devices={ranks}",
            f"exp_manager.exp_dir={folder}", f"exp_manager.name={name}", ranks=ranks,
        )  # fmt: skip
        (folder / name / "checkpoints" / f"{name}.nemo").rename(folder / f"{name}.nemo")
        tiedlora("export", folder / f"{name}.nemo", "--base", base, "--out", folder / "peft" / name)
    return folder, base, request.param


@pytest.fixture(scope="module")
def expected(served):
    """Prompts, and what NeMo says to them with each adapter and without one: greedy, all scores anew for each token."""
    folder, base, _ = served
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "saved")
    asked = []
    for name in (None, *ADAPTERS):
        with toy.clean_megatron(), generator(base, name and folder / f"{name}.nemo") as loaded:
            for prompt in ("what is 3 plus 4?", "what is 17 plus 9? it"):
                ids = tokenizer(prompt, add_special_tokens=False).input_ids
                asked.append({"adapter": name, "ids": ids, "said": greedy(loaded.model.model, ids)})
    for number in range(2):
        assert len({tuple(prompt["said"]) for prompt in asked[number::2]}) > 2, "the adapters hardly change the text"
    return asked


@torch.no_grad()
def greedy(model, ids):
    ids = list(ids)
    start = len(ids)
    for _ in range(TOKENS):
        row = torch.tensor([ids]).cuda()
        ids.append(int(model(row, torch.arange(len(ids))[None].cuda(), None)[0, -1].argmax()))
    return ids[start:]


def test_one_batch_of_the_engine_says_what_nemo_says(served, expected):
    folder = served[0]
    prompts = [{"adapter": prompt["adapter"], "ids": prompt["ids"]} for prompt in expected]
    adapters = {name: str(folder / "peft" / name) for name in ADAPTERS}
    (folder / "requests.json").write_text(json.dumps({"adapters": adapters, "prompts": prompts, "tokens": TOKENS}))
    command = [PYTHON, HERE / "engine.py", folder / "saved", folder / "requests.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    compare(json.loads(done.stdout.splitlines()[-1]), expected, "engine", served)


def test_the_servers_endpoint_says_what_nemo_says(served, expected):
    folder = served[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; the CPU build's own command looks for a package of another name than it has.
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "saved", "--served-model-name", "base",
        "--enable-lora", "--lora-modules", *(f"{name}={folder / 'peft' / name}" for name in ADAPTERS),
        "--max-loras", len(ADAPTERS) + 1, "--max-lora-rank", 16, "--max-model-len", 256, "--dtype", "float32",
        "--enforce-eager", "--port", port, "--host", "127.0.0.1",
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("w") as out, subprocess.Popen(
        [*map(str, command)], stdout=out, stderr=out, env=ENVIRONMENT, start_new_session=True
    ) as server:  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            with ThreadPoolExecutor(len(expected)) as together:
                said = list(together.map(lambda prompt: completion(port, prompt), expected))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, 9)
    compare(said, expected, "server", served)


def wait_for(address, server, log):
    for _ in range(600):
        if server.poll() is not None:
            pytest.fail(f"vllm serve ended: {log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vllm serve does not answer: {log.read_text()[-3000:]}")


def completion(port, prompt):
    """The new tokens that the OpenAI endpoint gives."""
    body = {
        "model": prompt["adapter"] or "base", "prompt": prompt["ids"], "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def compare(said, expected, way, served):
    """Token for token; what was seen goes into the file that ``SERVING_RESULTS`` names."""
    assert said == [prompt["said"] for prompt in expected]
    results = os.environ.get("SERVING_RESULTS")
    if not results:
        return
    folder, _, case = served
    path = Path(results)
    found = json.loads(path.read_text()) if path.exists() else {"made_by": "make test-serving", "runs": {}}
    command = [PYTHON, "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"]
    vllm = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    adapters = {}
    for name, (scheme, _, ranks) in ADAPTERS.items():
        trained = f"{ranks} {BASES[case][2]}-parallel ranks" if ranks > 1 else "one process"
        sizes = {"bytes": size_of(folder / f"{name}.nemo"), "peft_bytes": size_of(folder / "peft" / name)}
        adapters[name] = {"scheme": scheme, "trained_on": trained, **sizes}
    found["runs"][f"{case}, {way}"] = {
        "date": date.today().isoformat(),
        "vllm": vllm,
        "nemo_toolkit": metadata.version("nemo_toolkit"),
        "adapters": adapters,
        "requests": len(said),
        "tokens": sum(map(len, said)),
        "equal_tokens": sum(map(len, said)),
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
