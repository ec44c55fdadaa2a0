"""The ops: one folder each, one public function each. How to add one: docs/add_an_op.md."""

from repkern.ops._grad_mult import ChannelMultiplier
from repkern.ops._library import OPS
from repkern.ops._select import BACKENDS, available_backends, use_backend
from repkern.ops.branch_norm_add import (
    Norm,
    branch_norm_add,
    branch_norm_add_backward,
    branch_norm_statistics,
    branch_norm_sums,
)
from repkern.ops.compose_sequential import compose_sequential
from repkern.ops.direct_conv2d import (
    direct_conv2d,
    direct_conv2d_packed,
    direct_pack_weight,
    direct_unpack_weight,
)
from repkern.ops.grad_mult_adamw import grad_mult_adamw_
from repkern.ops.grad_mult_sgd import grad_mult_sgd_
from repkern.ops.orepa_squeeze import SqueezeBranches, orepa_squeeze, orepa_squeeze_many
from repkern.ops.winograd_conv2d import (
    winograd_conv2d,
    winograd_conv2d_packed,
    winograd_pack_weight,
    winograd_stride2_conv2d,
    winograd_stride2_conv2d_packed,
    winograd_stride2_transform_weight,
    winograd_transform_weight,
)

__all__ = [
    "BACKENDS",
    "OPS",
    "ChannelMultiplier",
    "Norm",
    "SqueezeBranches",
    "available_backends",
    "branch_norm_add",
    "branch_norm_add_backward",
    "branch_norm_statistics",
    "branch_norm_sums",
    "compose_sequential",
    "direct_conv2d",
    "direct_conv2d_packed",
    "direct_pack_weight",
    "direct_unpack_weight",
    "grad_mult_adamw_",
    "grad_mult_sgd_",
    "orepa_squeeze",
    "orepa_squeeze_many",
    "use_backend",
    "winograd_conv2d",
    "winograd_conv2d_packed",
    "winograd_pack_weight",
    "winograd_stride2_conv2d",
    "winograd_stride2_conv2d_packed",
    "winograd_stride2_transform_weight",
    "winograd_transform_weight",
]
