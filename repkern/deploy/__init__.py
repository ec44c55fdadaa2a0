"""Deployment: trained models as files for inference engines."""

from repkern.deploy.export import BatchCheck, ExportReport, export

__all__ = ["BatchCheck", "ExportReport", "export"]
