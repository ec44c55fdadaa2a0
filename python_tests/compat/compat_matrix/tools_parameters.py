"""Parameters: who finds them, and who writes them."""

import copy

import torch
from torch import nn

from compat_matrix.table import tool
from compat_matrix.values import close, folds, plain_of, step, trains
from repkern.nn import ConvNormAct, CSLAConv2d, DiracConv2d, OREPAConv2d, RepGhostModule, TrivialRepConv2d

PARAMETERS = "Parameters and initializers"
KERNEL_CONVS = (OREPAConv2d, CSLAConv2d, DiracConv2d, TrivialRepConv2d)


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def check_groups(case, groups):
    """`groups(model)` has every trainable parameter once, and an optimizer of them trains the block."""
    model = nn.Sequential(case.make(), nn.Conv2d(case.make()(case.images()).shape[1], 2, 1).double())
    made = groups(model)
    found = [parameter for group in made for parameter in group["params"]]
    assert len({id(p) for p in found}) == len(found), "a parameter is in two groups"
    assert {id(p) for p in found if p.requires_grad} == {id(p) for p in trainable(model)}, "not every parameter"
    before = [parameter.detach().clone() for parameter in trainable(model[0])]
    step(model, case.images(), made, training=False)  # batch statistics make some gradients zero
    for (name, p), old in zip([n for n in model[0].named_parameters() if n[1].requires_grad], before, strict=True):
        assert not torch.equal(p, old), f"{name} does not move"
    folds(model, case.images())


def is_vector(model, name, parameter):
    """Whether a rule of weight decay should spare it: norms, biases and scales of channels."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return name.endswith("bias") or isinstance(owner, nn.BatchNorm2d | nn.PReLU) or "scale" in name.split(".")[-2]


def check_decay(case, decayed):
    """`decayed(model)` are the names of parameters that decay: kernels, all of them and nothing else."""
    model = nn.Sequential(case.make())
    expected = {n for n, p in model.named_parameters() if not is_vector(model, n, p)}
    assert decayed(model) == expected


@tool("groups by attribute", PARAMETERS)
def by_attribute(case):
    """`for m in net.modules()`: `m.weight` and `m.bias` that are parameters, as detectors build their groups; every
    trainable parameter is found once, and a step moves all of them."""

    def groups(model):
        norms, weights, biases = [], [], []
        for module in model.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                biases.append(bias)
            if isinstance(weight, nn.Parameter):
                (norms if isinstance(module, nn.BatchNorm2d) else weights).append(weight)
        return [{"params": params} for params in (norms, weights, biases) if params]

    check_groups(case, groups)


@tool("groups by `param.ndim`", PARAMETERS)
def by_ndim(case):
    """`ndim > 1` decays: all kernels, and no norm, bias or scale of channels."""
    check_decay(case, lambda model: {name for name, p in model.named_parameters() if p.ndim > 1})
    check_groups(
        case, lambda m: [{"params": [p for p in m.parameters() if (p.ndim > 1) is two]} for two in (True, False)]
    )


@tool("groups by name", PARAMETERS)
def by_name(case):
    """`name.endswith(".weight")` and `".bias"`: every trainable parameter is found once, and a step moves all."""

    def groups(model):
        ends = (".weight", ".bias")
        return [{"params": [p for name, p in model.named_parameters() if name.endswith(end)]} for end in ends]

    check_groups(case, groups)


@tool("timm's `param_groups_weight_decay`", PARAMETERS)
def as_timm(case):
    """Its rule, `param.ndim <= 1 or name.endswith(".bias")` does not decay, spares norms, biases and scales only."""

    def groups(model):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        spared = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
        kept = [p for name, p in named if not (p.ndim <= 1 or name.endswith(".bias"))]
        return [{"params": spared, "weight_decay": 0.0}, {"params": kept, "weight_decay": 0.05}]

    check_decay(
        case, lambda m: {name for name, p in m.named_parameters() if not (p.ndim <= 1 or name.endswith(".bias"))}
    )
    check_groups(case, groups)


def written_kernels(model, initialize):
    """Apply an initializer, and return what it wrote last into every convolution that is written to."""
    written = {}

    def recorded(module):
        before = module.weight.detach().clone() if isinstance(module, nn.Conv2d) else None
        initialize(module)
        if before is not None and not torch.equal(module.weight, before):
            written[module] = module.weight.detach().clone()

    model.apply(recorded)
    return written


def check_written(case, initialize):
    block = case.make()
    model = nn.Sequential(block)
    written = written_kernels(model, initialize)
    assert written, "the initializer found no convolution"
    if isinstance(block, KERNEL_CONVS):
        close(plain_of(block).weight, written[block], "the kernel that was written")
        written = {block: written[block]}
    for module, value in written.items():
        close(module.weight, value, "weight read again")
    folds(model, case.images())
    trains(model, case.images())


@tool("initializer by class name", PARAMETERS, refused={ConvNormAct: AttributeError, RepGhostModule: AttributeError})
def by_class_name(case):
    """DCGAN's `weights_init`: `m.weight.data.normal_()` where the class's name has "Conv", and norms where it has
    "BatchNorm". The block's kernel is what was written; a `ConvNormAct` has "Conv" in its name and no `weight`."""

    def initialize(module):
        name = type(module).__name__
        if "Conv" in name:
            nn.init.normal_(module.weight.data, 0.0, 0.02)
        elif "BatchNorm" in name and module.affine:
            nn.init.normal_(module.weight.data, 1.0, 0.02)
            nn.init.constant_(module.bias.data, 0)

    check_written(case, initialize)


@tool("initializer by `isinstance`", PARAMETERS)
def by_isinstance(case):
    """`isinstance(m, nn.Conv2d)`: `nn.init.kaiming_normal_(m.weight)`, `zeros_(m.bias)`; norms to 1 and 0. The block's
    kernel is what was written."""

    def initialize(module):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    check_written(case, initialize)


@tool("`requires_grad_(False)` of a block", PARAMETERS)
def frozen(case):
    """A frozen block gives its input a gradient and its deployed form requires none."""
    block = case.make().requires_grad_(False)
    x = case.images().requires_grad_()
    block(x).square().sum().backward()
    expected = torch.autograd.grad(plain_of(block)(x).square().sum(), x)[0]
    close(x.grad, expected, "gradient of the input")
    assert not any(p.requires_grad for p in plain_of(block).parameters())
    assert copy.deepcopy(block).requires_grad_(True) is not None
