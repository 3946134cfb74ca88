"""Exported files as models: what `val` and `predict` run in place of a checkpoint."""

from sp_yolo.backends.exported import ExportedModel
from sp_yolo.backends.facts import FACTS, Facts, Runner
from sp_yolo.backends.formats import RUNTIMES, Runtime, require, runtime_of

__all__ = ["FACTS", "RUNTIMES", "ExportedModel", "Facts", "Runner", "Runtime", "require", "runtime_of"]
