"""What is measured: cases read from one line of text each, with their arithmetic and traffic counted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CONV_CASES",
    "DEFAULT_CASES",
    "Case",
    "ConvCase",
    "Layer",
    "Maps",
    "conv_cases",
    "load_cases",
    "parse_cases",
]

# name  op  layers: co,ci,k,groups[*count] ...; compose_sequential: cm,ci,k1,groups co,cm,k2,groups;
# branch_norm_add: n,c,h,w[*branches] [channels_last]; grad_mult_*: the network whose parameters are stepped
DEFAULT_CASES = """
c64            orepa_squeeze       64,64,3,1
c128           orepa_squeeze       128,128,3,1
c256           orepa_squeeze       256,256,3,1
c512           orepa_squeeze       512,512,3,1
c256_g4        orepa_squeeze       256,256,3,4
c128_k5        orepa_squeeze       128,128,5,1
c256_depthwise orepa_squeeze       256,256,3,256
c256_1x1       orepa_squeeze       256,256,1,1
resnet18       orepa_squeeze_many 64,64,3,1*4 128,64,3,1 128,128,3,1*3 256,128,3,1 256,256,3,1*3 \
                                   512,256,3,1 512,512,3,1*3
repvgg_a0      orepa_squeeze_many 48,3,3,1 48,48,3,1*2 96,48,3,1 96,96,3,1*3 192,96,3,1 192,192,3,1*13 1280,192,3,1
stem_5x5       compose_sequential  64,3,3,1 64,64,3,1
stem_7x7       compose_sequential  64,3,5,1 64,64,3,1
bn_64x64       branch_norm_add     16,48,64,64*3
bn_32x32       branch_norm_add     16,48,32,32*3
bn_16x16       branch_norm_add     16,96,16,16*3
bn_8x8         branch_norm_add     16,192,8,8*3
bn_64x64_last  branch_norm_add     16,48,64,64*3 channels_last
bn_8x8_last    branch_norm_add     16,192,8,8*3 channels_last
b1_sgd         grad_mult_sgd       repopt_vgg_b1
b1_adamw       grad_mult_adamw     repopt_vgg_b1
"""

# winograd_conv2d: channels (in and out), height and width of the layers of VGG-like networks; batch 1 and 8
CONV_CASES = "64,112 64,56 128,28 256,14 192,14 96,28 48,56 512,7 512,14"
# direct_conv2d: inputs, outputs, height and width, kernel, stride of the other layers of deployed networks
DIRECT_CASES = """3,48,224,3,2 3,64,224,3,2 48,48,112,3,2 64,128,56,3,2 96,192,28,3,2 192,1280,14,3,2 512,512,14,1,1"""
_CONV_BATCHES = (1, 8)

_OPS = (
    "orepa_squeeze",
    "orepa_squeeze_many",
    "compose_sequential",
    "branch_norm_add",
    "grad_mult_sgd",
    "grad_mult_adamw",
)
_MOST_BRANCHES = 16
_LAYER = re.compile(r"(\d+),(\d+),(\d+),(\d+)(?:\*(\d+))?")
_MAX_GROUPS_WITH_ONE_SET = 4  # the released rule for the internal channels: twice as many beyond this


@dataclass(frozen=True)
class Layer:
    """The sizes of one layer; an OREPA layer of kernel size 1 has only the origin and 1x1-1x1 branches."""

    co: int
    ci: int
    k: int
    groups: int

    @property
    def cm(self) -> int:
        """Internal channels of the 1x1-KxK branch."""
        return self.ci if self.groups <= _MAX_GROUPS_WITH_ONE_SET else 2 * self.ci

    @property
    def expansion(self) -> int:
        """Channels of the depthwise stage per input channel; 0 when there is no such branch."""
        return 8 if self.k > 1 else 0

    @property
    def branches(self) -> int:
        """How many of the six branches exist."""
        return 6 if self.k > 1 else 2

    def squeeze_flops(self) -> int:
        """Multiplications and additions of one squeeze: the 1x1-KxK product, dw-pw, and the scaled sum."""
        pairs = self.co * self.ci // self.groups
        return 2 * pairs * self.k**2 * (self.cm // self.groups + self.expansion + self.branches)


@dataclass(frozen=True)
class Maps:
    """The maps of a branch_norm_add, all normalized with batch statistics, ReLU behind the sum."""

    n: int
    c: int
    h: int
    w: int
    branches: int
    channels_last: bool

    def flops(self) -> tuple[int, int]:
        """Forward: statistics (4 a value) and sum (2). Backward: the sum again, sums (3) and gradients (5)."""
        values = self.n * self.c * self.h * self.w * self.branches
        return 6 * values, 10 * values


@dataclass(frozen=True)
class Case:
    """One line of a shapes file."""

    name: str
    op: str
    layers: tuple[Layer, ...]
    maps: Maps | None = None
    network: str = ""  # of an optimizer step

    def flops(self, what: str) -> int:
        """Of "forward", "backward" (of products twice the forward: two for one) or "forward+backward"."""
        if self.maps is not None:
            forward, backward = self.maps.flops()
            return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[what]
        if self.op == "compose_sequential":
            first, second = self.layers
            forward = 2 * second.co * second.ci // second.groups * first.ci // first.groups * (first.k * second.k) ** 2
        else:
            forward = sum(layer.squeeze_flops() for layer in self.layers)
        return {"forward": 1, "backward": 2, "forward+backward": 3}[what] * forward


def parse_cases(text: str, source: str = "cases") -> list[Case]:
    """The cases in `text`, one a line, `#` starts a comment. ValueError names the line that cannot be read."""
    cases: list[Case] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        where = f"{source}, line {number}"
        if len(words) < 3 or words[1] not in _OPS:
            raise ValueError(
                f"{where}: wanted `name op co,ci,k,groups[*count] ...` with op one of {', '.join(_OPS)}, got {line!r}"
            )
        if words[1] == "branch_norm_add":
            cases.append(Case(words[0], words[1], (), _parse_maps(words[2:], where)))
            continue
        if words[1].startswith("grad_mult_"):
            if len(words) != 3:
                raise ValueError(f"{where}: {words[1]} takes the name of one network, got {' '.join(words[2:])!r}")
            cases.append(Case(words[0], words[1], (), network=words[2]))
            continue
        layers = tuple(layer for word in words[2:] for layer in _parse_layer(word, where))
        _check_case(words[1], layers, where)
        cases.append(Case(words[0], words[1], layers))
    return cases


def load_cases(path: Path | None) -> list[Case]:
    """The cases of a shapes file; the default ones without a path. OSError or ValueError when it cannot be read."""
    return parse_cases(DEFAULT_CASES) if path is None else parse_cases(path.read_text(), path.name)


def _parse_layer(word: str, where: str) -> list[Layer]:
    match = _LAYER.fullmatch(word)
    if match is None:
        raise ValueError(f"{where}: a layer is co,ci,k,groups or co,ci,k,groups*count, got {word!r}")
    co, ci, k, groups = (int(part) for part in match.groups()[:4])
    if min(co, ci, k, groups) < 1 or co % groups or ci % groups or k % 2 == 0:
        raise ValueError(f"{where}: sizes must be positive, k odd and channels multiples of groups, got {word!r}")
    return [Layer(co, ci, k, groups)] * int(match.group(5) or 1)


def _parse_maps(words: list[str], where: str) -> Maps:
    match = _LAYER.fullmatch(words[0])
    if match is None or words[1:] not in ([], ["channels_last"]):
        raise ValueError(f"{where}: maps are n,c,h,w or n,c,h,w*branches [channels_last], got {' '.join(words)!r}")
    n, c, h, w, branches = (int(part or 1) for part in match.groups())
    if min(n, c, h, w) < 1 or n * h * w == 1 or not 1 <= branches <= _MOST_BRANCHES:
        raise ValueError(
            f"{where}: several values a channel and 1 to {_MOST_BRANCHES} branches needed, got {words[0]!r}"
        )
    return Maps(n, c, h, w, branches, len(words) > 1)


def _check_case(op: str, layers: tuple[Layer, ...], where: str) -> None:
    if op == "orepa_squeeze" and len(layers) != 1:
        raise ValueError(f"{where}: orepa_squeeze takes one layer, got {len(layers)}; use orepa_squeeze_many")
    if op != "compose_sequential":
        return
    if len(layers) != 2 or layers[1].ci != layers[0].co or layers[0].groups != layers[1].groups:
        raise ValueError(f"{where}: compose_sequential takes two layers that fit together, got {layers}")


@dataclass(frozen=True)
class ConvCase:
    """A 3x3 convolution of stride 1 and padding 1."""

    n: int
    c: int
    k: int
    h: int
    w: int

    @property
    def name(self) -> str:
        """As in tables: c64_112_n1."""
        return f"c{self.c}_{self.h}_n{self.n}"

    def flops(self) -> int:
        """Multiplications and additions of direct convolution."""
        return 18 * self.n * self.c * self.k * self.h * self.w


def conv_cases(text: str = CONV_CASES, batches: tuple[int, ...] = _CONV_BATCHES) -> list[ConvCase]:
    """Cases from words `channels,size`, each for every batch size. ValueError names the word that cannot be read."""
    cases: list[ConvCase] = []
    for word in text.split():
        match = re.fullmatch(r"([1-9]\d*),([1-9]\d*)", word)
        if match is None:
            raise ValueError(f"a convolution is channels,size with both at least 1, got {word!r}")
        channels, size = int(match[1]), int(match[2])
        cases += [ConvCase(n, channels, channels, size, size) for n in batches]
    return cases
