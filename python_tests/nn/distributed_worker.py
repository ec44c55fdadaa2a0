"""One of two processes: gradients under DistributedDataParallel must be those of the whole batch on one process."""

import sys

import torch
from process_group import process_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from repkern.nn import OREPAConv2d, group_squeeze


def check(rank, world, grouped):
    torch.manual_seed(rank)  # ranks start apart; DistributedDataParallel sends rank 0's parameters to all
    layers = [OREPAConv2d(3, 4, 3), nn.ReLU(), OREPAConv2d(4, 4, 3, groups=4), OREPAConv2d(4, 2, 1)]
    model = nn.Sequential(*layers).double()
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


rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with process_group(rank, world, store):
    check(rank, world, sys.argv[4] == "grouped")
print("equal", flush=True)
