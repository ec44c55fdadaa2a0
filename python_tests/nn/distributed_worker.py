"""One of two processes: gradients under DistributedDataParallel must be those of the whole batch on one process."""

import os
import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from repkern.nn import OREPAConv2d, group_squeeze

rank, world, store, grouped = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "grouped"
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
torch.manual_seed(rank)  # ranks start apart; DistributedDataParallel sends rank 0's parameters to all
model = nn.Sequential(OREPAConv2d(3, 4, 3), nn.ReLU(), OREPAConv2d(4, 4, 3, groups=4), OREPAConv2d(4, 2, 1)).double()
if grouped:
    group_squeeze(model)
parallel = DistributedDataParallel(model)
images = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
for _ in range(2):
    parallel.zero_grad()
    parallel(images.chunk(world)[rank]).square().mean().backward()
averaged = [parameter.grad.clone() for parameter in model.parameters()]
model.zero_grad()
model(images).square().mean().backward()
for (name, parameter), gradient in zip(model.named_parameters(), averaged, strict=True):
    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")
distributed.destroy_process_group()
print("equal", flush=True)
os._exit(0)  # something, not found yet, sometimes aborts the end of the interpreter after all checks passed
