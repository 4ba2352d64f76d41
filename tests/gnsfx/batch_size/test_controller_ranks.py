"""Two real processes that measure different step times decide the same, at the same step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import gnsfx
from gnsfx.batch_size.controller import BatchSizeController

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, x):
        return self.layer(x)

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
net = Net()
model = DistributedDataParallel(torch.compile(net, backend="gns", options={"gns.inner": "eager"}))
noise, optimizer = gnsfx.NoiseScale(model), torch.optim.AdamW(net.parameters(), lr=1e-3)
policy = BatchSizeController(
    noise, micro_batch=4, bounds=(8, 64), target="time", warm_up=20, min_steps=10, period=5, max_factor=8
)
torch.manual_seed(rank + 1)
for step in range(60):
    for _ in range(policy.accumulation):
        x = torch.randn(4, 6)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True) + 3 * torch.randn(4, 1))
        (loss / policy.accumulation).backward()
    noise.step(), optimizer.step(), optimizer.zero_grad()
    if change := policy.step(seconds=(1 + rank) * 0.1 + (1 + 9 * rank) * 0.01 * policy.batch_size):
        change.apply(optimizer)
group = optimizer.param_groups[0]
found = {"unit": policy.unit.size, "own": str(policy.step_time), "lr": group["lr"], "betas": group["betas"]}
found |= {"changes": [str(change) for change in policy.changes], "reason": policy.reason, "last": policy.batch_size}
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(found, file)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_rank_0_decides(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program, tmp_path]
    finished = subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("own") != second.pop("own")  # each has its own clock
    assert first == second and first["unit"] == 8
    assert len(first["changes"]) >= 1 and "t0 = 0.1 s, t1 = 0.01 s per example" in first["reason"]
