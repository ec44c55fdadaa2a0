"""RepOpt-VGG (paper 2205.15242, Table 1): RepVGG's shape, trained as plain convolutions by a RepOptimizer."""

from __future__ import annotations

from repkern.models.repvgg import Variant

__all__ = ["DEFAULT_BLOCK", "MODELS"]

#: The target network. "csla" is the block of its Hyper-Search, "repvgg" the paper's baseline.
DEFAULT_BLOCK = "conv_bn"

_B = (4, 6, 16, 1)
_L = (8, 14, 24, 1)
_SHAPES = {"b1": (_B, 2, 4), "b2": (_B, 2.5, 5), "l1": (_L, 2, 4), "l2": (_L, 2.5, 5)}
# The extra squeeze-excite of Table 3, after each ReLU.
_POST_SE = 4

MODELS = {f"repopt_vgg_{name}": Variant(*shape) for name, shape in _SHAPES.items()} | {
    f"repopt_vgg_{name}_se": Variant(*shape, post_se=_POST_SE) for name, shape in _SHAPES.items()
}
