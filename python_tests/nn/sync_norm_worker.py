"""One of two processes: synchronized norms on parts of a batch must be ordinary norms on the whole of it."""

import sys

import torch
from process_group import process_group
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from repkern.nn.branch_sum import Branch, branch_norm_sum, norm_scale_shift

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
CHANNELS, STEPS = 4, 2
# Samples on each process and the size of their maps. (1, 3) of size 1: one process has a single value a channel, which
# it could not normalize alone.
SPLITS = (((1, 4), 5), ((1, 3), 1), ((0, 3), 5))


class Block(nn.Module):
    """3x3, 1x1 with a norm before an average, the input with a frozen norm, and the input as it is."""

    def __init__(self, norm, recompute):
        super().__init__()
        self.recompute = recompute
        self.dense = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.avg = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.inner = norm(CHANNELS)
        self.norms = nn.ModuleList([norm(CHANNELS), norm(CHANNELS, momentum=None), norm(CHANNELS, affine=False)])

    def _average(self, x):
        y = self.avg(x)
        scale, shift = norm_scale_shift(y, self.inner)
        return torch.tanh(functional.avg_pool2d(y * scale[:, None, None] + shift[:, None, None], 3, 1, 1))

    def forward(self, x):
        branches = [Branch(self.norms[0], self.dense), Branch(self.norms[1], self._average, cheap=True)]
        branches += [Branch(self.norms[2]), Branch(None)]
        return branch_norm_sum(x, branches, nn.SiLU(), recompute=self.recompute)


def freeze_one(net):
    net[0].norms[2].eval()
    return net


def all_reduced(gradient):
    total = gradient.clone()
    distributed.all_reduce(total)
    return total


def check(parts, size, recompute):
    """Steps of the same network on this process's part and on the whole batch."""
    torch.manual_seed(0)
    alone = freeze_one(nn.Sequential(Block(nn.BatchNorm2d, "none"), Block(nn.BatchNorm2d, "none")).double())
    for parameter in alone.parameters():
        nn.init.normal_(parameter, 0.2, 0.5)
    together = freeze_one(
        nn.Sequential(Block(nn.SyncBatchNorm, recompute), Block(nn.SyncBatchNorm, recompute)).double()
    )
    together.load_state_dict(alone.state_dict())
    for _ in range(STEPS):
        whole = torch.randn(sum(parts), CHANNELS, size, size, dtype=torch.float64, requires_grad=True)
        weights = torch.randn_like(whole)
        part = whole.detach().split(parts)[rank].clone().requires_grad_()
        alone.zero_grad()
        together.zero_grad()
        wanted, out = alone(whole), together(part)
        (wanted * weights).sum().backward()
        (out * weights.split(parts)[rank]).sum().backward()
        close("output", out, wanted.split(parts)[rank])
        close("gradient of the input", part.grad, whole.grad.split(parts)[rank])
        for (name, p), q in zip(together.named_parameters(), alone.parameters(), strict=True):
            close(name, all_reduced(p.grad), q.grad)
        for (name, a), b in zip(together.named_buffers(), alone.buffers(), strict=True):
            close(name, a, b)


def check_data_parallel(recompute):
    """DistributedDataParallel averages the gradients of ordinary norms, whether maps are made again or not."""
    torch.manual_seed(0)
    net = nn.Sequential(Block(nn.BatchNorm2d, recompute), Block(nn.BatchNorm2d, recompute)).double()
    alone = nn.Sequential(Block(nn.BatchNorm2d, "none"), Block(nn.BatchNorm2d, "none")).double()
    alone.load_state_dict(net.state_dict())
    parallel = DistributedDataParallel(net, bucket_cap_mb=1e-4)
    for _ in range(STEPS):
        part = torch.randn(4, CHANNELS, 5, 5, dtype=torch.float64).chunk(world)[rank]
        for model in (parallel, alone):
            model.zero_grad()
            model(part).square().mean().backward()
        for (name, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
            close(f"averaged {name}", p.grad, all_reduced(q.grad) / world)


def close(what, actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")


with process_group(rank, world, store):
    for parts, size in SPLITS:
        for recompute in ("none", "cheap"):
            check(parts, size, recompute)
    for recompute in ("none", "cheap"):
        check_data_parallel(recompute)
print("equal", flush=True)
