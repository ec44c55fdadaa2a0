"""Deployment: trained models as files for inference engines."""

from repkern.deploy.convert import Conversion, reparameterize_file
from repkern.deploy.export import FILE_SUFFIXES, BatchCheck, ExportReport, export
from repkern.deploy.inference_conv import InferenceConv2d
from repkern.deploy.inference_model import InferenceModel
from repkern.deploy.opening import Opened, open_model
from repkern.deploy.optimize import PRECISIONS, optimize_for_inference
from repkern.deploy.report import LayerReport, OptimizeReport

__all__ = [
    "FILE_SUFFIXES",
    "PRECISIONS",
    "BatchCheck",
    "Conversion",
    "ExportReport",
    "InferenceConv2d",
    "InferenceModel",
    "LayerReport",
    "Opened",
    "OptimizeReport",
    "export",
    "open_model",
    "optimize_for_inference",
    "reparameterize_file",
]
