"""A model -> a file that other runtimes execute, checked against the model before it is kept."""

from sp_yolo.export.end2end import EndToEnd
from sp_yolo.export.files import ExportResult, export_model

__all__ = ["EndToEnd", "ExportResult", "export_model"]
