"""What every exported block promises, whatever its branches."""

import copy
import inspect

import pytest
import torch
from torch import nn

import repkern.nn
from repkern import reparameterize, replace_convs
from repkern.nn import OREPADeepStem, RepBlock

EXPORTED = [getattr(repkern.nn, name) for name in repkern.nn.__all__]
BLOCKS = [kind for kind in EXPORTED if isinstance(kind, type) and issubclass(kind, RepBlock) and kind is not RepBlock]
GEOMETRY = (4, 4, 2, 5, 1, None, 1, "zeros")
every_block = pytest.mark.parametrize("kind", BLOCKS)


def options(kind, **wanted):
    known = inspect.signature(kind).parameters
    return {name: value for name, value in wanted.items() if name in known}


def made(kind, explicit, geometry=GEOMETRY, **wanted):
    geometry = tuple(2 if at == 5 and size is None else size for at, size in enumerate(geometry))
    return explicit.make(kind, geometry, **options(kind, **wanted))


def storages(module):
    return {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}


def test_all_are_here():
    assert len(BLOCKS) >= 15
    for kind in BLOCKS:
        assert kind.__doc__
        assert kind.forward is not RepBlock.forward


@every_block
def test_copies_pickles_memory_formats_and_conversion(kind, explicit, randomize, same):
    explicit.check_life(randomize(made(kind, explicit, activation=nn.ReLU())), same)


@every_block
def test_half_precision(kind, explicit, randomize):
    explicit.check_half(randomize(made(kind, explicit)))


@every_block
def test_every_parameter_is_used(kind, explicit, randomize):
    explicit.check_every_parameter_is_used(randomize(made(kind, explicit, activation=nn.SiLU())))


@every_block
def test_autocast_and_back(kind, explicit, randomize, same):
    block = randomize(made(kind, explicit)).float().train()
    x = torch.randn(3, 4, 9, 9, requires_grad=True)
    exact = copy.deepcopy(block).double()(x.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        output = block(x)
    # A few roundings of bfloat16 in every branch, then sums of up to seven.
    same(output.double(), exact, 32 * torch.finfo(torch.bfloat16).eps, "autocast")
    output.float().square().mean().backward()
    for name, parameter in [("input", x), *block.named_parameters()]:
        if parameter.requires_grad:
            assert parameter.grad.dtype is torch.float32, name
            assert torch.isfinite(parameter.grad).all(), name


@every_block
def test_state_dict_round_trip(kind, explicit, randomize):
    block = randomize(made(kind, explicit)).eval()
    other = made(kind, explicit).eval()
    x = explicit.images(4)
    assert not torch.equal(other(x), block(x))
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), block(x))
    plain, fresh = block.fuse(), other.fuse()
    nn.init.zeros_(fresh.weight)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(x), plain(x))


@every_block
def test_blocks_share_nothing(kind, explicit):
    one, other = made(kind, explicit), made(kind, explicit)
    for first, second in ((one, other), (one, one.fuse())):
        assert not {id(module) for module in first.modules()} & {id(module) for module in second.modules()}
        storages = [
            {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
            for block in (first, second)
        ]
        assert not storages[0] & storages[1]


@every_block
def test_fusing_leaves_flags_and_the_block_alone(kind, explicit, randomize):
    block = randomize(made(kind, explicit, activation=nn.ReLU()))
    before = copy.deepcopy(block.state_dict())
    x = torch.ones(1, 4, 6, 6, dtype=torch.float64)
    outputs = []
    for training in (True, False):
        fused = block.train(training).fuse()
        assert all(
            module.training is training for module in (fused, *fused.children()) if module is not block.activation
        )
        outputs.append(fused(x))
    assert torch.equal(*outputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


@every_block
def test_nothing_is_printed(kind, explicit, capfd):
    block = made(kind, explicit)
    block(explicit.images(4))
    block.eval().fuse()
    assert capfd.readouterr() == ("", "")


@every_block
def test_on_the_meta_device(kind):
    block = kind(4, 4, 5, 1, 2, device="meta", dtype=torch.bfloat16)
    assert {tensor.device.type for tensor in (*block.parameters(), *block.buffers())} == {"meta"}
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}


@every_block
def test_synchronized_norms(kind, explicit, randomize, same):
    block = randomize(made(kind, explicit)).eval()
    x = explicit.images(4)
    expected = block(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    same(synced(x), expected, explicit.FUSED, "eval output")
    same(synced.fuse()(x), expected, explicit.FUSED, "fused")


@every_block
def test_an_empty_batch(kind, explicit):
    block = made(kind, explicit).eval()
    assert block(torch.zeros(0, 4, 9, 9, dtype=torch.float64)).shape == (0, 4, 9, 9)


@every_block
def test_in_a_pretrained_net(kind, explicit, randomize, same):
    if kind is OREPADeepStem:
        with pytest.raises(ValueError, match="OREPADeepStem cannot start as a given convolution"):
            replace_convs(nn.Sequential(nn.Conv2d(3, 4, 5)), kind, preserve=True)
    elif kind.has_norm:
        explicit.check_replaced(kind, randomize, same)
    else:
        net = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 0, 2, 2, padding_mode="zeros")
        )
        net, x = net.double(), explicit.images(4)
        new = replace_convs(copy.deepcopy(net), kind, preserve=True)
        assert isinstance(new[0], kind)
        same(new(x), net(x), explicit.GRADIENT, "preserved")
        same(reparameterize(randomize(new.eval()))(x), new(x), explicit.GRADIENT, "reparameterized")


@every_block
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, 4, 4), ValueError, r"kernel_size must be odd .*, got 4"),
        ((4, 4, (5, 3)), ValueError, r"kernel_size must be square, got \(5, 3\)"),
        ((4, 6, 5, 0), ValueError, "stride must be at least 1, got 0"),
        ((4, 6, 5, 1, -1), ValueError, "padding must be at least 0, got -1"),
        ((4, 6, 5, 1, 1, 0), ValueError, "dilation must be at least 1, got 0"),
        ((4, 6, 5, 1, 1, 1, 4), ValueError, r"out_channels \(=6\) must be divisible by groups \(=4\)"),
        ((0, 6, 5), ValueError, "in_channels must be at least 1, got 0"),
        ((4.0, 6, 5), TypeError, "in_channels must be an integer, got 4.0"),
    ],
)
def test_bad_arguments(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(*arguments)


@every_block
def test_bad_options(kind):
    with pytest.raises(ValueError, match=r"padding_mode must be one of zeros, .*, got 'same'"):
        kind(4, 4, 5, padding_mode="same")
    with pytest.raises(TypeError, match=r"dtype must be .*, got torch\.int64"):
        kind(4, 4, 5, dtype=torch.int64)
    if options(kind, activation=None):
        with pytest.raises(TypeError, match=r"activation must be an nn\.Module instance or None"):
            kind(4, 4, 5, activation=nn.ReLU)
    if options(kind, recompute="none"):
        with pytest.raises(ValueError, match="recompute must be one of none, cheap, got 'always'"):
            kind(4, 4, 5, recompute="always")


@every_block
def test_bad_input(kind):
    with pytest.raises(ValueError, match=r"the input must be \[\(N,\) 4, H, W\], got \(2, 3, 9, 9\)"):
        kind(4, 4, 5)(torch.zeros(2, 3, 9, 9))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: repkern.nn.RepVGGBlock(4, 4, 3, stride=True), TypeError, "stride must be an integer, got True"),
        (lambda: repkern.nn.RepVGGBlock(4, 4, 3, dilation=2**62), ValueError, "dilation must be at most"),
        (lambda: repkern.nn.ACBlock(4, 4, 3, gamma_init=float("nan")), ValueError, "gamma_init must be a number"),
        (lambda: repkern.nn.ACBlock(4, 4, 3, gamma_init=2j), ValueError, "gamma_init must be a number"),
        (lambda: repkern.nn.CSLABlock(4, 4, 3, dense_scale=float("inf")), ValueError, "dense_scale must be finite"),
        (lambda: repkern.nn.CSLABlock(4, 4, 3, dense_scale="1"), TypeError, "dense_scale must be a number or a tensor"),
        (lambda: repkern.nn.SqueezeExcite(2, 2, dtype=torch.int32), TypeError, "dtype must be"),
        (lambda: repkern.nn.RepGhostModule(4, 4, raw_identity=2), TypeError, "raw_identity must be True or False"),
        (lambda: repkern.nn.MobileOneBlock(4, 4, 3, num_conv_branches=2**64), ValueError, "from 1 to 256"),
        (lambda: repkern.nn.DyRepBlock(4, 4, 3, branches=torch.tensor(2.5)), TypeError, "0-d tensor"),
    ],
)
def test_senseless_options_name_the_value(make, error, text):
    with pytest.raises(error, match=text):
        make()
