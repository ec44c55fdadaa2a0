"""Reading checkpoints: ours, and the released layouts of the papers' implementations."""

from repkern.models.checkpoints.load import LAYOUTS, load_checkpoint

__all__ = ["LAYOUTS", "load_checkpoint"]
