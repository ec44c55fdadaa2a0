"""RepOptimizers (paper 2205.15242): the prior is in the optimizer, the network is plain (docs/repoptimizers.md)."""

from repkern.optim.adamw import RepAdamW
from repkern.optim.build import INITIALIZE, OPTIMIZERS, from_scales, grad_mults, reinitialize
from repkern.optim.decay import weight_decay_groups
from repkern.optim.files import load_scales, save_scales
from repkern.optim.grad_mult import GradMult
from repkern.optim.initialize import csla_kernel, initialize_kernel
from repkern.optim.scales import CONSTANTS, INITIAL, check_scales, derived_scales
from repkern.optim.sgd import RepSGD

__all__ = [
    "CONSTANTS",
    "INITIAL",
    "INITIALIZE",
    "OPTIMIZERS",
    "GradMult",
    "RepAdamW",
    "RepSGD",
    "check_scales",
    "csla_kernel",
    "derived_scales",
    "from_scales",
    "grad_mults",
    "initialize_kernel",
    "load_scales",
    "reinitialize",
    "save_scales",
    "weight_decay_groups",
]
