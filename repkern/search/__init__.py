"""Searches: algorithm objects that own no files and work with any training loop."""

from repkern.optim.files import load_scales, save_scales
from repkern.search.hyper import HyperSearch

__all__ = ["HyperSearch", "load_scales", "save_scales"]
