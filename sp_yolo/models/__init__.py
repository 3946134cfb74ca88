"""A model configuration -> the network that turns images into raw predictions; and its weights, from any file."""

from sp_yolo.models.build import DetectionModel, build_model
from sp_yolo.models.deploy import deploy
from sp_yolo.models.weights.checkpoints import read_checkpoint
from sp_yolo.models.weights.transfer import TransferReport, description, follow_names, load_weights, model_from_weights

__all__ = [
    "DetectionModel",
    "TransferReport",
    "build_model",
    "deploy",
    "description",
    "follow_names",
    "load_weights",
    "model_from_weights",
    "read_checkpoint",
]
