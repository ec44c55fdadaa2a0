"""A network of timm, trained with timm's own parts: optimizer factory, scheduler, mixup, moving average.

Needs timm (pip install timm), and one line of repkern: `replace_convs` before the optimizer is made.

python examples/timm_style.py
"""

from __future__ import annotations

import argparse
import functools

import torch
from shapes import draw_shapes
from torch import Tensor, nn

import repkern
from repkern.optim import weight_decay_groups

try:
    from timm import create_model
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3
except ImportError as error:
    raise SystemExit(f"this example needs timm ({error}): pip install timm") from None

NAMES = ("circle", "square", "triangle", "cross")


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and their labels."""
    images, labels = draw_shapes(NAMES, count, seed=seed)
    return images / 127.5 - 1, labels


def train(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """The loop of timm's train script, without what is not needed for it to be seen. Returns the moving average."""
    images, labels = pictures(options.images, seed=0)
    steps = len(images) // options.batch_size
    # timm's own rule (filter_bias_and_bn) takes no decay off what has one dimension, as this one does; this one knows
    # besides that the scale or norm of an identity branch is the weight of that branch.
    groups = functools.partial(weight_decay_groups, weight_decay=5e-4)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=options.lr, param_group_fn=groups)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=options.epochs, warmup_epochs=1, warmup_lr=options.lr / 10,
        step_on_epochs=False, updates_per_epoch=steps,
    )  # fmt: skip
    mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.05, num_classes=len(NAMES))
    average = ModelEmaV3(model, decay=0.9)
    loss_of, update = SoftTargetCrossEntropy(), 0

    for epoch in range(epochs):
        model.train()
        for chosen in torch.randperm(len(images))[: steps * options.batch_size].view(steps, -1):
            mixed, targets = mixup(images[chosen], labels[chosen])
            with torch.autocast("cpu", torch.bfloat16, enabled=options.amp):
                loss = loss_of(model(mixed), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update += 1
            average.update(model, step=update)
            scheduler.step_update(num_updates=update)
        print(f"epoch {epoch + 1}  loss {loss.item():.3f}  learning rate {optimizer.param_groups[0]['lr']:.2g}")
    return average.module


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In eval mode."""
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train, deploy, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="any of timm's networks with convolutions")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=768, help="pictures to train on")
    parser.add_argument("--batch-size", type=int, default=32, help="even, for mixup")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--amp", action="store_true", help="forward pass in bfloat16")
    options = parser.parse_args()

    torch.manual_seed(0)
    report = repkern.nn.ReplaceReport()
    network = create_model(options.model, num_classes=len(NAMES))
    model = repkern.replace_convs(network, preserve=True, report=report)  # from timm's own first values
    print(report)
    trained = train(model, options)
    images, labels = pictures(256, seed=1)
    plain = repkern.reparameterize(trained.eval(), verify=images[:16])
    # What was deployed is timm's own network again: its weights load into it by name.
    fresh = create_model(options.model, num_classes=len(NAMES))
    fresh.load_state_dict(plain.state_dict())
    for name, network in (("trained", trained), ("deployed", plain), ("timm's", fresh)):
        print(f"{name}: {type(network).__name__}, accuracy {accuracy(network, images, labels):.1%}")


if __name__ == "__main__":
    main()
