"""Networks by name, their checkpoints, and the segmentation head over them."""

from repkern.models.network import Feature, Network
from repkern.models.pspnet import PSPNet
from repkern.models.registry import create_model, default_block, list_models
from repkern.models.saving import load, save

__all__ = ["Feature", "Network", "PSPNet", "create_model", "default_block", "list_models", "load", "save"]
