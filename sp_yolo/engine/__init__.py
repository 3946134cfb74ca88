"""The only place that knows data, models, losses, optimizer and evaluation at once."""

from sp_yolo.engine.trainer import Trainer

__all__ = ["Trainer"]
