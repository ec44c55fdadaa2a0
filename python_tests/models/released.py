"""Released networks without their code: state_dicts of their names, and what they compute, written line by line."""

import math

import torch
from torch.nn import functional

NORM_PARTS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Tensors(dict):
    """A state_dict being written, float64 unless it is only for its shapes."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.device = device

    def normal(self, name, *shape, scale=1.0, mean=0.0):
        self[name] = mean + scale * torch.randn(*shape, dtype=torch.float64, device=self.device)

    def uniform(self, name, *shape, low=0.5, high=1.5):
        self[name] = low + (high - low) * torch.rand(*shape, dtype=torch.float64, device=self.device)

    def conv(self, name, co, ci, k, groups=1, bias=False):
        height, width = (k, k) if isinstance(k, int) else k
        scale = math.sqrt(2 / (ci // groups * height * width))
        self.normal(f"{name}.weight", co, ci // groups, height, width, scale=scale)
        if bias:
            self.normal(f"{name}.bias", co, scale=0.2)

    def norm(self, name, channels):
        self.uniform(f"{name}.weight", channels)
        self.normal(f"{name}.bias", channels, scale=0.2)
        self.normal(f"{name}.running_mean", channels, scale=0.3)
        self.uniform(f"{name}.running_var", channels)
        self[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=self.device) + 7

    def conv_norm(self, prefix, co, ci, k, groups=1, conv="conv", norm="bn"):
        self.conv(prefix + conv, co, ci, k, groups)
        self.norm(prefix + norm, co)

    def linear(self, name, co, ci):
        self.normal(f"{name}.weight", co, ci, scale=0.1)
        self.normal(f"{name}.bias", co)

    def excite(self, prefix, channels, reduced, names=("down", "up")):
        self.conv(f"{prefix}.{names[0]}", reduced, channels, 1, bias=True)
        self.conv(f"{prefix}.{names[1]}", channels, reduced, 1, bias=True)

    def orepa_kernel(self, stem, co, ci, rows=6):
        """OREPA's branches; `stem` is "...weight_orepa_" or "...weight_rbr_", which has no 1x1 of its own."""
        block = stem.rpartition("weight_")[0]
        sizes = {"origin": (ci, 3), "avg_conv": (ci, 1), "pfir_conv": (ci, 1), "1x1_kxk_conv2": (ci, 3)}
        sizes |= {"gconv_pw": (8 * ci, 1)} | ({} if stem.endswith("rbr_") else {"1x1": (ci, 1)})
        for name, (inputs, k) in sizes.items():
            self.normal(stem + name, co, inputs, k, k, scale=math.sqrt(2 / (inputs * k * k)))
        self.normal(f"{stem}gconv_dw", 8 * ci, 1, 3, 3, scale=0.5)
        self.normal(f"{stem}1x1_kxk_idconv1", ci, ci, 1, 1, scale=0.1)
        self.uniform(f"{block}vector", rows, co, low=0.2, high=0.6)
        self[f"{stem}avg_avg"] = torch.full((3, 3), 1 / 9).double()
        self[f"{block}id_tensor"] = torch.eye(ci, dtype=torch.float64)[:, :, None, None]
        prior = torch.empty(co, 3, 3)
        for at in range(co):
            for h in range(3):
                for w in range(3):
                    along, number = (h, at + 1) if at < co / 2 else (w, at + 1 - co / 2)
                    prior[at, h, w] = math.cos(math.pi * (along + 0.5) * number / 3)
        self[f"{stem}prior"] = prior.double()


# --- what layers compute, in eval mode


def orepa_kernel(t, stem):
    """The squeezed 3x3 kernel of a dense OREPA block."""
    block = stem.rpartition("weight_")[0]
    own = {name.removeprefix(stem): value for name, value in t.items() if name.startswith(stem)}
    v = [row[:, None, None, None] for row in t[f"{block}vector"]]
    ci = own["origin"].shape[1]
    reduce = (own["1x1_kxk_idconv1"] + t[f"{block}id_tensor"])[:, :, 0, 0]
    terms = [
        own["origin"],
        own["avg_conv"] * own["avg_avg"],
        own["pfir_conv"] * own["prior"][:, None],
        torch.einsum("omhw,mi->oihw", own["1x1_kxk_conv2"], reduce),
    ]
    if "1x1" in own:
        terms.append(functional.pad(own["1x1"], (1, 1, 1, 1)))
    terms.append(torch.einsum("ithw,oit->oihw", own["gconv_dw"].view(ci, 8, 3, 3), own["gconv_pw"].view(-1, ci, 8)))
    return sum(row * term for row, term in zip(v, terms, strict=False))


def conv(t, x, name, stride=1, padding=0, groups=1):
    return functional.conv2d(x, t[f"{name}.weight"], t.get(f"{name}.bias"), stride, padding, 1, groups)


def norm(t, x, name):
    weight, bias, mean, var = (t[f"{name}.{part}"] for part in NORM_PARTS[:4])
    return functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)


def excited(t, x, name, names=("down", "up"), gate=torch.sigmoid):
    y = conv(t, x.mean((2, 3), keepdim=True), f"{name}.{names[0]}")
    return x * gate(conv(t, functional.relu(y), f"{name}.{names[1]}"))


def pooled(t, x, name):
    return functional.linear(x.mean((2, 3)), t[f"{name}.weight"], t[f"{name}.bias"])


# --- RepVGG: (layers per stage), channels of the stem and of the stages, groups of a layer by its number


def repvgg_layers(layers, channels, groups=1):
    """(prefix, Ci, Co, stride, groups) of every block."""
    rows = [("stage0.", 3, channels[0], 2, 1)]
    before, number = channels[0], 1
    for stage, count in enumerate(layers, start=1):
        for at in range(count):
            own = groups if number % 2 == 0 and number <= 26 else 1
            rows.append((f"stage{stage}.{at}.", before, channels[stage], 2 if at == 0 else 1, own))
            before, number = channels[stage], number + 1
    return rows


def write_repvgg_block(t, prefix, ci, co, stride, groups, se=None, post_se=None):
    if se:
        t.excite(f"{prefix}se", co, max(1, co // se))
    if post_se:
        t.excite(f"{prefix}post_se", co, max(1, co // post_se))
    if ci == co and stride == 1:
        t.norm(f"{prefix}rbr_identity", co)
    t.conv_norm(f"{prefix}rbr_dense.", co, ci, 3, groups)
    t.conv_norm(f"{prefix}rbr_1x1.", co, ci, 1, groups)


def repvgg_sum(t, x, prefix, stride, groups):
    y = norm(t, conv(t, x, f"{prefix}rbr_dense.conv", stride, 1, groups), f"{prefix}rbr_dense.bn")
    y = y + norm(t, conv(t, x, f"{prefix}rbr_1x1.conv", stride, 0, groups), f"{prefix}rbr_1x1.bn")
    return y + norm(t, x, f"{prefix}rbr_identity") if f"{prefix}rbr_identity.weight" in t else y


def repvgg_block(t, x, prefix, stride, groups):
    y = repvgg_sum(t, x, prefix, stride, groups)
    y = excited(t, y, f"{prefix}se") if f"{prefix}se.up.weight" in t else y
    y = functional.relu(y)
    return excited(t, y, f"{prefix}post_se") if f"{prefix}post_se.up.weight" in t else y


def write_repvgg(rows, classes, device="cpu", **excite):
    t = Tensors(device)
    for row in rows:
        write_repvgg_block(t, *row, **excite)
    t.linear("linear", classes, rows[-1][2])
    return t


def run_blocks(t, x, rows, block):
    """Any network of one block after the other, and the linear layer."""
    for prefix, _, _, stride, groups in rows:
        x = block(t, x, prefix, stride, groups)
    return pooled(t, x, "linear")


def uncertainty(run, x):
    """How far float64 outputs may be apart: what noise of 1e-13 on the input, as of hundreds of roundings, becomes."""
    expected = run(x)
    noise = 1e-13 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    moved = (run(x * (1 + noise)) - expected).abs().max()
    return expected, 4 * float(moved) + 1e-12 * float(expected.abs().max())


def deploy_repvgg(t, rows):
    """The released deploy form: each block folded, all else as it is."""
    out = Tensors()
    for prefix, ci, co, _, groups in rows:
        kernel, bias = folded(t, f"{prefix}rbr_dense.conv", f"{prefix}rbr_dense.bn")
        small, small_bias = folded(t, f"{prefix}rbr_1x1.conv", f"{prefix}rbr_1x1.bn")
        kernel = kernel + functional.pad(small, (1, 1, 1, 1))
        bias = bias + small_bias
        if f"{prefix}rbr_identity.weight" in t:
            factor, shift = scale_and_shift(t, f"{prefix}rbr_identity")
            for channel in range(co):
                kernel[channel, channel % (ci // groups), 1, 1] += factor[channel]
            bias = bias + shift
        out[f"{prefix}rbr_reparam.weight"], out[f"{prefix}rbr_reparam.bias"] = kernel, bias
        out |= {name: value for name, value in t.items() if name.startswith((f"{prefix}se.", f"{prefix}post_se."))}
    out |= {name: value for name, value in t.items() if name.startswith("linear.")}
    return out


def scale_and_shift(t, name):
    factor = t[f"{name}.weight"] / torch.sqrt(t[f"{name}.running_var"] + 1e-5)
    return factor, t[f"{name}.bias"] - t[f"{name}.running_mean"] * factor


def folded(t, conv_name, norm_name):
    factor, shift = scale_and_shift(t, norm_name)
    return t[f"{conv_name}.weight"] * factor[:, None, None, None], shift


def renamed(t, table):
    """The same tensors by other names: each (old, new) is replaced in every name, in order."""
    out = {}
    for name, value in t.items():
        for old, new in table:
            name = name.replace(old, new)
        out[name] = value
    assert len(out) == len(t)
    return out
