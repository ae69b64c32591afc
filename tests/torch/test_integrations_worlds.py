"""Tools of others on two processes: each trains as one process does with the gradients averaged, and resumes."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch.distributed", reason="this torch has no torch.distributed")

COMMON = r"""
import copy, os, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from orthlin.torch import LowRankMuon

FOLDER = sys.argv[1]
RANK, WORLD, BATCH = int(os.environ["RANK"]), 2, 4
generator = torch.Generator().manual_seed(3)
X, Y = torch.randn(64, 24, generator=generator), torch.randn(64, 16, generator=generator)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 32), nn.Linear(32, 32), nn.Linear(32, 16)
    def forward(self, x, labels):
        return {"loss": (self.c(self.b(self.a(x).relu()).relu()) - labels).square().mean()}

def net():
    torch.manual_seed(0)
    return Net()

def make(model, kind=LowRankMuon, **options):
    return kind(model.parameters(), **options, lr=0.02, rank=8)

def rows(t, rank=RANK):
    return slice((WORLD * t + rank) * BATCH, (WORLD * t + rank + 1) * BATCH)

def loss(model, where):
    return model(X[where], Y[where])["loss"]

def step(model, optimizer, t, backward=torch.Tensor.backward):
    optimizer.zero_grad()
    backward(loss(model, rows(t)))
    optimizer.step()

def alone(steps, places=lambda t: slice(WORLD * t * BATCH, WORLD * (t + 1) * BATCH)):
    model = net()
    optimizer = make(model)
    for t in range(steps):
        optimizer.zero_grad()
        loss(model, places(t)).backward()
        optimizer.step()
    return model

def values(model):
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]

def check(model, reference):
    off = max(float((x - y).abs().max()) for x, y in zip(values(model), values(reference), strict=True))
    assert off <= 1e-4, off
    assert any(float((x - y).abs().max()) > 1e-2 for x, y in zip(values(model), values(net()), strict=True))

def check_same(first, second):
    assert all(torch.equal(x, y) for x, y in zip(values(first), values(second), strict=True))
"""
TOOLS = {
    "ZeroRedundancyOptimizer": r"""
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
def start():
    model = DistributedDataParallel(net())
    return model, make(model, ZeroRedundancyOptimizer, optimizer_class=LowRankMuon)
model, optimizer = start()
for t in range(3):
    step(model, optimizer, t)
optimizer.consolidate_state_dict(0)
states = [copy.deepcopy(optimizer.state_dict()) if RANK == 0 else None]
dist.broadcast_object_list(states, 0)
again, other = start()
again.load_state_dict(model.state_dict())
other.load_state_dict(states[0])
for each, its in ((model, optimizer), (again, other)):
    for t in range(3, 5):
        step(each, its, t)
check_same(model, again)
check(model, alone(5))
""",
    "Accelerate, DDP": r"""
from accelerate import Accelerator
tool = Accelerator(cpu=True)
model = net()
model, optimizer = tool.prepare(model, make(model))
for t in range(3):
    step(model, optimizer, t, tool.backward)
tool.save_state(FOLDER)
ends = []
for _ in range(2):
    for t in range(3, 5):
        step(model, optimizer, t, tool.backward)
    ends.append(copy.deepcopy(tool.unwrap_model(model)))
    tool.load_state(FOLDER)
check_same(*ends)
check(ends[0], alone(5))
""",
    # Accelerate has FSDP for accelerators only; what it does there runs on the host all the same.
    "Accelerate, FSDP2": r"""
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, load_fsdp_optimizer, save_fsdp_optimizer
plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
tool = Accelerator(fsdp_plugin=plugin)
AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
model = net()
model, optimizer = tool.prepare(model, make(model))
assert all(isinstance(p, DTensor) for p in model.parameters())
for t in range(3):
    step(model, optimizer, t, tool.backward)
weights = [p.detach().clone() for p in model.parameters()]
save_fsdp_optimizer(plugin, tool, optimizer.optimizer, model, FOLDER)
ends = []
for _ in range(2):
    for t in range(3, 5):
        step(model, optimizer, t, tool.backward)
    ends.append(values(model))
    load_fsdp_optimizer(plugin, tool, optimizer.optimizer, model, FOLDER)
    for p, weight in zip(model.parameters(), weights, strict=True):
        p.detach().copy_(weight)
assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))
for t in range(3, 5):
    step(model, optimizer, t, tool.backward)
check(model, alone(5))
""",
    "Lightning, DDP": r"""
import lightning
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()
    def training_step(self, batch, _):
        return self.net(*batch)["loss"]
    def configure_optimizers(self):
        return make(self.net)
data = TensorDataset(X, Y)
loader = DataLoader(data, BATCH, sampler=DistributedSampler(data, WORLD, RANK, shuffle=False))
module = Module()
lightning.Trainer(
    accelerator="cpu", devices=WORLD, strategy="ddp", max_steps=5, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, default_root_dir=FOLDER,
).fit(module, loader)
check(module.net, alone(5))  # every other row of 8: the same 8 rows
""",
    "Trainer": r"""
from transformers import Trainer, TrainingArguments
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return len(X)
    def __getitem__(self, i):
        return {"x": X[i], "labels": Y[i]}
model = net()
arguments = TrainingArguments(
    FOLDER, use_cpu=True, per_device_train_batch_size=BATCH, max_steps=5, report_to=[], save_strategy="no",
    logging_strategy="no", disable_tqdm=True, max_grad_norm=0.0, train_sampling_strategy="sequential",
)
optimizer = make(model)
constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
Trainer(model, arguments, train_dataset=Data(), optimizers=(optimizer, constant)).train()
check(model, alone(5))
""",
}
# What is tested ends with the last check.  A thread of Gloo may still hold tensors as Python ends, for which it wants
# the GIL; then the process aborts, which has been seen behind a closed process group, too.  So Python does not end.
END = """
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
os._exit(0)
"""
NEEDED = {"Accelerate": "accelerate", "Lightning": "lightning", "Trainer": "transformers"}


@pytest.mark.parametrize("tool", TOOLS)
def test_it_trains_as_one_process_and_resumes(tmp_path, tool):
    if needed := NEEDED.get(tool.partition(",")[0]):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    script = tmp_path / "script.py"
    script.write_text(COMMON + TOOLS[tool] + END)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONFAULTHANDLER": "1",  # where an abort came from
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
