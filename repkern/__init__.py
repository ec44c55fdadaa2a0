"""repkern: structural re-parameterization of convolutional networks, with its own CPU, CUDA and Triton kernels."""

import torch  # noqa: F401  first: the native module then shares torch's OpenMP threads

from repkern._info import build_info
from repkern.deploy import optimize_for_inference
from repkern.models import create_model, list_models
from repkern.models.checkpoints import load_checkpoint
from repkern.nn import OREPAConv2d, reparameterize, replace_convs
from repkern.ops import available_backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "OREPAConv2d",
    "__version__",
    "available_backends",
    "build_info",
    "create_model",
    "list_models",
    "load_checkpoint",
    "optimize_for_inference",
    "reparameterize",
    "replace_convs",
    "use_backend",
]
