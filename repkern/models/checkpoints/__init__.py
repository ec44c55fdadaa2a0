"""Reading checkpoints: ours, and the released layouts of the papers' implementations."""

from repkern.models.checkpoints.load import LAYOUTS, load_checkpoint
from repkern.models.checkpoints.match import LoadReport

__all__ = ["LAYOUTS", "LoadReport", "load_checkpoint"]
