"""OREPA in somebody's plain PyTorch loop: the lines of repkern are marked, everything else is the loop's own.

The loop has what such loops have: parameter groups, mixed precision, a moving average, DistributedDataParallel.

python examples/foreign_loop.py --amp
torchrun --nproc-per-node 2 examples/foreign_loop.py
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
from shapes import draw_shapes
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import repkern
from repkern.optim import weight_decay_groups

NAMES = ("circle", "square", "triangle", "cross")


def make_model() -> nn.Module:
    """The network that somebody has; nothing in it knows of repkern."""

    def layer(before: int, after: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    body = [*layer(3, 16, 1), *layer(16, 32, 2), *layer(32, 32, 1), *layer(32, 64, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(NAMES)))


def pictures(count: int, seed: int) -> TensorDataset:
    """Images in [-1, 1] and their labels."""
    images, labels = draw_shapes(NAMES, count, seed=seed)
    return TensorDataset(images / 127.5 - 1, labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In eval mode, on the device of the model."""
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def train(options: argparse.Namespace, device: torch.device, world: int) -> nn.Module:
    """Returns the moving average of the network, in training form."""
    torch.manual_seed(0)
    # repkern: before optimizer, average and DDP. preserve: from the first values that the learning rate was chosen for.
    model = repkern.replace_convs(make_model(), preserve=True).to(device)
    groups = weight_decay_groups(model, 5e-4)  # repkern: kernels decay, norms and scales of branches do not
    optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)

    data = pictures(options.images, seed=0)
    sampler = DistributedSampler(data) if world > 1 else None
    loader = DataLoader(data, options.batch_size // world, shuffle=sampler is None, sampler=sampler, drop_last=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.epochs * len(loader))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    trained: nn.Module = DistributedDataParallel(model) if world > 1 else model

    for epoch in range(options.epochs):
        trained.train()
        if sampler is not None:
            sampler.set_epoch(epoch)
        for images, labels in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
                loss = cross_entropy(trained(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"epoch {epoch + 1}  loss {loss.item():.3f}")
    return average.module


def main() -> None:
    """Train, deploy, compare; in as many processes as torchrun started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=1024, help="pictures to train on")
    parser.add_argument("--batch-size", type=int, default=32, help="over all processes")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--amp", action="store_true", help="forward pass in bfloat16")
    options = parser.parse_args()

    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = train(options, device, world)  # the DDP wrapper ends with the function, before the group does
    if int(os.environ.get("RANK", "0")) == 0:
        images, labels = (tensor.to(device) for tensor in pictures(256, seed=1).tensors)
        plain = repkern.reparameterize(model.eval(), verify=images)  # repkern: one convolution a block, and checked
        for name, network in (("trained", model), ("deployed", plain)):
            parameters = sum(parameter.numel() for parameter in network.parameters())
            print(f"{name}: {parameters} parameters, accuracy {accuracy(network, images, labels):.1%}")
    if world > 1:
        gc.collect()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
