"""OREPA in a model of your own: three lines around a training loop. Runs in seconds on random data.

python examples/your_own_model.py
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import repkern


def make_model() -> nn.Module:
    """Any model with convolutions; this one has a normal, a grouped and a depthwise one."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def main() -> None:
    """Swap, train, deploy, and see that the function stayed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    report = repkern.nn.ReplaceReport()
    model = repkern.replace_convs(make_model(), report=report)
    print(report)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.randn(64, 3, 16, 16), torch.randint(10, (64,))
    for step in range(steps):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step:2d}  loss {loss.item():.3f}")

    plain = repkern.reparameterize(model.eval(), verify=images)
    with torch.inference_mode():
        difference = (plain(images) - model(images)).abs().max().item()
    print(plain)
    print(f"largest difference between the trained and the deployed network: {difference:.2g}")


if __name__ == "__main__":
    main()
