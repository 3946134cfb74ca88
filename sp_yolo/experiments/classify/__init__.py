"""The paper's setting, image classification: data in memory, small networks, every optimizer, exactly repeatable."""

from sp_yolo.experiments.classify.data import ImageSet, Source, open_source
from sp_yolo.experiments.classify.models import MODELS, build_classifier
from sp_yolo.experiments.classify.settings import ClassifyConfig, load_classify_config
from sp_yolo.experiments.classify.splits import Splits, make_splits
from sp_yolo.experiments.classify.training import Outcome, fit

__all__ = [
    "MODELS",
    "ClassifyConfig",
    "ImageSet",
    "Outcome",
    "Source",
    "Splits",
    "build_classifier",
    "fit",
    "load_classify_config",
    "make_splits",
    "open_source",
]
