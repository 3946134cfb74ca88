"""Raw prediction maps and targets -> loss."""

from sp_yolo.losses.detection import DetectionLoss, LossParts, scale_gains

__all__ = ["DetectionLoss", "LossParts", "scale_gains"]
