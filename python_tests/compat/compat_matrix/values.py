"""What every cell of the matrix compares."""

import torch

from repkern import reparameterize

EQUAL = 1e-10  # float64, relative to the largest value


def close(actual, expected, what, bound=EQUAL):
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference, largest = float((actual - expected).detach().abs().max()), float(expected.detach().abs().max())
    assert difference <= bound * max(largest, 1e-3), f"{what}: off by {difference:.3g}, the largest is {largest:.3g}"


def folds(block, x, what="deployed form"):
    """The block's output in eval mode, which its deployed form must give too."""
    was = block.training
    wanted = block.eval()(x)
    close(reparameterize(block)(x), wanted, what)
    block.train(was)
    return wanted.detach()


def plain_of(block):
    """Its deployed form as it is now; the block stays."""
    return reparameterize(block).eval()


def trains(block, x):
    """Every trainable parameter gets a gradient, of which some value is not zero in eval mode."""
    for training in (True, False):
        block.train(training).zero_grad()
        block(x).square().sum().backward()
        for name, parameter in block.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"no gradient of {name}"
                assert torch.isfinite(parameter.grad).all(), f"gradient of {name} is not finite"
                assert training or parameter.grad.any(), f"gradient of {name} is zero"


def step(block, x, groups=None, *, training=True):
    """One step of SGD, which must change what the block computes."""
    before = block.eval()(x).detach()
    optimizer = torch.optim.SGD(block.parameters() if groups is None else groups, lr=0.05)
    optimizer.zero_grad()
    block.train(training)(x).square().mean().backward()
    optimizer.step()
    block.eval()
    assert not torch.equal(block(x), before), "the step changed nothing"


def gradients(block):
    return {name: p.grad for name, p in block.named_parameters() if p.requires_grad}


def same_gradients(block, other, what):
    """Gradients of two blocks with the same parameters; some are zero but for rounding, so the largest counts."""
    largest = max(float(gradient.abs().max()) for gradient in gradients(other).values())
    for (name, one), two in zip(gradients(block).items(), gradients(other).values(), strict=True):
        assert one is not None, f"{what}: no gradient of {name}"
        difference = float((one - two).abs().max())
        assert difference <= EQUAL * largest, f"{what}: gradient of {name} off by {difference:.3g} of {largest:.3g}"
