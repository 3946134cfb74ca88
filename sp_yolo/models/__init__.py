"""A model configuration -> the network that turns images into raw predictions; and its weights, from any file."""

from sp_yolo.models.build import DetectionModel, build_model
from sp_yolo.models.channels import ChannelGroups, channel_groups
from sp_yolo.models.compact import check_compact, compact
from sp_yolo.models.deploy import deploy
from sp_yolo.models.weights.checkpoints import read_checkpoint
from sp_yolo.models.weights.transfer import TransferReport, description, follow_names, load_weights, model_from_weights

__all__ = [
    "ChannelGroups",
    "DetectionModel",
    "TransferReport",
    "build_model",
    "channel_groups",
    "check_compact",
    "compact",
    "deploy",
    "description",
    "follow_names",
    "load_weights",
    "model_from_weights",
    "read_checkpoint",
]
