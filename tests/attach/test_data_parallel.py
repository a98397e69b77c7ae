"""Two processes that see other samples train the same modules, as one process that sees all of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys, torch
from stack import Layers
from nemo_tiedlora import attach

several = len(sys.argv) > 1
if several:
    torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank() if several else 0
torch.manual_seed(0)
model = Layers(5)
adapter = attach(model, "dyna_lora", ["qkv"], rank=2, active=2, period=1)
trained = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if several else model
optimizer = torch.optim.SGD(adapter.parameter_groups(1e-1))
adapter.attach_to(optimizer)
x = torch.randn(6, 4, 6, dtype=torch.float64) * torch.tensor([1.0, 30.0]).repeat_interleave(2).view(4, 1)
for batch in x:
    mine = batch[2 * rank : 2 * rank + 2] if several else batch
    (trained(mine) - 0.3).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
for one in range(2 if several else 1):
    if one == rank:
        turns = [choice.active for choice in adapter.variant.log]
        flat = torch.cat([tensor.detach().flatten() for tensor in adapter.named_tensors().values()])
        print("END", json.dumps([turns, flat.tolist()]), flush=True)
    if several:
        torch.distributed.barrier()
"""


def ends(*command):
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line.partition("END ")[2]) for line in run.stdout.splitlines() if "END " in line]


@pytest.mark.thorough
def test_all_processes_choose_the_same_modules(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'tests'}")
    (tmp_path / "train.py").write_text(CODE, encoding="utf-8")
    script = str(tmp_path / "train.py")
    (alone,) = ends(script)
    first, second = ends("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, "several")
    assert first == second
    assert first[0] == alone[0] and len(set(map(tuple, alone[0]))) > 2
    assert first[1] == pytest.approx(alone[1], rel=1e-9, abs=1e-12)
