"""Two processes over gloo train as one does: with accelerate, and with the frozen weights spread by ``fully_shard``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_tiedlora.checkpoint import read

COMMON = """
import json, sys, torch, transformers
from nemo_tiedlora import huggingface
from nemo_tiedlora.errors import UsageError

KINDS = {
    "LoRA": ("tied_lora", {"preset": "LoRA", "lr_ratio": 4.0}),
    "TL6": ("tied_lora", {"preset": "TL6"}),
    "VeRA": ("vera", {}),
    "ShareLoRA": ("share_lora", {"groups": [[0, 1]]}),
    "CondLoRA": ("cond_lora", {}),
    "DoRA": ("tied_lora", {"preset": "TL6", "dora": True}),
    "DynaLoRA": ("dyna_lora", {"active": 2, "period": 1}),
    "LoRA-XS": ("lora_xs", {}),
    "Uni-LoRA": ("uni_lora", {"dimension": 50}),
}
SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
folder, several = sys.argv[1], sys.argv[2] == "several"

def adapted(kind, **more):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).double()
    scheme, settings = KINDS[kind]
    return huggingface.attach(model, scheme, ["attention_qkv", "mlp_fc2"], rank=2, **settings, **more)

def batches(rank):
    whole = torch.randint(0, 20, (3, 4, 8), generator=torch.Generator().manual_seed(1))
    return whole[:, 2 * rank : 2 * rank + 2] if several else whole

def loss_of(model, ids):
    logits = model(ids, use_cache=False).logits[:, :-1]  # the model's own loss is in float32
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

def shown(kind, losses, adapter):
    tensors = [tensor.detach().flatten() for tensor in adapter.parameters()]
    print("END", json.dumps([kind, losses, torch.cat(tensors).tolist()]), flush=True)
"""
SHARDED = """
from torch.distributed.fsdp import fully_shard

if several:
    torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank() if several else 0

def spread(adapter, ignored):
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in (*adapter.model.model.layers, adapter.model):
        fully_shard(layer, mesh=mesh, ignored_params=ignored)

for kind in KINDS:
    adapter = adapted(kind, modules_to_save=["lm_head"])
    model = adapter.model
    if several:
        spread(adapter, adapter.ignored_params())
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-1))
    adapter.attach_to(optimizer)
    losses = []
    for ids in batches(rank):
        losses.append(loss_of(model, ids).detach())
        for one in ids:  # two micro-batches
            (loss_of(model, one[None]) / len(ids)).backward()
        norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if several:
            torch.distributed.all_reduce(losses[-1])
            losses[-1] /= 2
    adapter.save(f"{folder}/{kind}")
    if rank == 0:
        shown(kind, torch.stack(losses).tolist(), adapter)
if several:
    for what in ("merge", "forward"):
        adapter = adapted("TL6")
        spread(adapter, adapter.ignored_params() if what == "merge" else None)
        try:
            adapter.merge() if what == "merge" else loss_of(adapter.model, batches(rank)[0])
        except UsageError as error:
            if rank == 0:
                print("END", json.dumps([what, str(error), []]), flush=True)
    torch.distributed.destroy_process_group()
"""
ACCELERATED = """
import accelerate

for kind in ("TL6", "DynaLoRA", "LoRA"):
    find = accelerate.DistributedDataParallelKwargs(find_unused_parameters=kind == "DynaLoRA")
    accelerator = accelerate.Accelerator(cpu=True, kwargs_handlers=[find])
    assert accelerator.num_processes == (2 if several else 1)
    adapter = adapted(kind)
    model, optimizer = accelerator.prepare(adapter.model, torch.optim.AdamW(adapter.parameter_groups(1e-1)))
    adapter.attach_to(optimizer.optimizer)
    losses = []
    for ids in batches(accelerator.process_index):
        loss = loss_of(model, ids)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if accelerator.is_main_process:
        adapter.save(f"{folder}/{kind}")
        shown(kind, losses, adapter)
    accelerator.free_memory()
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip


def ends(folder, *command):
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=folder)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line.partition("END ")[2]) for line in run.stdout.splitlines() if "END " in line]
    return {kind: (losses, tensors) for kind, losses, tensors in found}


@pytest.mark.thorough
@pytest.mark.parametrize(("launch", "code"), [(TORCHRUN, SHARDED), (ACCELERATE, ACCELERATED)], ids=["fsdp", "ddp"])
def test_two_processes_train_as_one_does(launch, code, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = tmp_path / "train.py"
    script.write_text(COMMON + code, encoding="utf-8")
    alone = ends(tmp_path, str(script), str(tmp_path / "1"), "alone")
    both = ends(tmp_path, *launch, str(script), str(tmp_path / "2"), "several")
    assert len(alone) >= 3
    for kind, (losses, tensors) in alone.items():
        assert both[kind][0] == pytest.approx(losses, rel=1e-9), kind
        assert both[kind][1] == pytest.approx(tensors, rel=1e-6, abs=1e-9), kind
        one, two = (read(tmp_path / number / kind) for number in "12")
        assert one.base == two.base and one.settings == two.settings
        for key, tensor in one.tensors.items():
            torch.testing.assert_close(two.tensors[key], tensor, rtol=1e-6, atol=1e-9)
    if code is SHARDED:
        assert "its weight is spread over processes; save the adapter, and merge it on one" in both["merge"][0]
        assert "fully_shard(..., ignored_params=adapter.ignored_params())" in both["forward"][0]
