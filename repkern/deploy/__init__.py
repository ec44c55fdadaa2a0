"""Deployment: trained models as files for inference engines."""

from repkern.deploy.convert import Conversion, reparameterize_file
from repkern.deploy.export import FILE_SUFFIXES, BatchCheck, ExportReport, export
from repkern.deploy.opening import Opened, open_model

__all__ = [
    "FILE_SUFFIXES",
    "BatchCheck",
    "Conversion",
    "ExportReport",
    "Opened",
    "export",
    "open_model",
    "reparameterize_file",
]
