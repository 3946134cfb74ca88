"""Paths -> batches: YOLO, COCO and VOC data sets, augmentation, deterministic loading, the generated toy set."""

from sp_yolo.data.augment import Sample
from sp_yolo.data.collate import Batch, collate
from sp_yolo.data.dataset import DetectionDataset, Item, SampleMeta
from sp_yolo.data.folder import describe_folder, refuse_no_description
from sp_yolo.data.loader import Loader, build_loader
from sp_yolo.data.toy import ensure_toy_dataset

__all__ = [
    "Batch",
    "DetectionDataset",
    "Item",
    "Loader",
    "Sample",
    "SampleMeta",
    "build_loader",
    "collate",
    "describe_folder",
    "ensure_toy_dataset",
    "refuse_no_description",
]
