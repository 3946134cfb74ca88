"""What one classification run is told, and what each optimizer does unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sp_yolo.config import HYP_RULES, Recipe, Rule, check_hyperparameter, checked, option, parse_assignments
from sp_yolo.config.run import OPTIMIZER_WORDS, read_arguments
from sp_yolo.engine.optimizer import find_optimizer
from sp_yolo.experiments.classify.models import MODELS

# Hyperparameters that differ from a detector's, of every optimizer.
_DEFAULTS = {"lrf": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "warmup_epochs": 0.0, "warmup_bias_lr": 0.0}
_GENERAL = ("lr0", *_DEFAULTS, "warmup_momentum", "label_smoothing", "clip_norm")
# sp_channels is of detectors, whose rows say which channels belong together.
KEYS = (*_GENERAL, *(key for key in HYP_RULES if key.startswith("sp_") and key != "sp_channels"))


@dataclass(frozen=True)
class ClassifyData:
    """What is trained on."""

    dataset: str = option("mnist", "mnist, cifar10, toy, or a path: idx, npz, image folder")
    root: str = option("", "where mnist or cifar10 lies (default datasets/NAME)", metavar="DIR")
    download: bool = option(False, "let torchvision fetch mnist or cifar10 first (default: do not)")
    image_size: int = option(32, "side in px that images of folders and toy are brought to", rule=Rule(8, 512))
    samples: int = option(0, "training images, stratified (default 0: all)", rule=Rule(0))
    val_samples: int = option(0, "cut from the training data (default 1000)", rule=Rule(0))
    label_noise: float = option(
        0.0, "share of training labels that are made wrong, in [0, 1] (default 0)", rule=Rule(0, 1), metavar="SHARE"
    )
    augment: bool | None = option(None, "random crops and flips (default: of pictures in colour only)")


@dataclass(frozen=True)
class ClassifyTraining:
    """How it is trained."""

    model: str = option("cnn", "small network to train", rule=Rule(words=tuple(MODELS)))
    epochs: int = option(20, "passes over the training images", rule=Rule(1))
    batch_size: int = option(50, "images per step", "--batch-size", "--batch", rule=Rule(2))
    device: str = option("", "cpu, 0, 1, ... ('' = first GPU, else CPU)")
    overrides: Mapping[str, Any] = option(
        {}, "override a hyperparameter; repeatable", "--set", metavar="KEY=VALUE", repeated=True, read=parse_assignments
    )


@dataclass(frozen=True)
class ClassifyConfig(ClassifyData, ClassifyTraining):
    """Optimizer.

    ``samples``, ``val_samples``, ``label_noise``: see ``make_splits``. ``augment``: None is crop and flip for pictures
    in colour, nothing for others. ``overrides``: hyperparameters by the recipes' names.
    """

    optimizer: str = option("sp", f"sp-paper, {OPTIMIZER_WORDS}")
    opt: Mapping[str, Any] = option(
        {}, "argument of the optimizer's class; repeatable", metavar="KEY=VALUE", repeated=True, read=read_arguments
    )
    seed: int = option(0, "first seed", rule=Rule(0, 2**32 - 1))

    @staticmethod
    def prepare(given: Mapping[str, Any]) -> dict[str, Any]:
        """The values as the fields have them; see :func:`sp_yolo.config.options.checked`."""
        overrides = given.get("overrides", {})
        found = {key: check_hyperparameter(key, value, "classification", KEYS) for key, value in overrides.items()}
        find_optimizer(given.get("optimizer", "sp"), given.get("opt", {}))
        return {**given, "overrides": found}

    def recipe(self) -> Recipe:
        """Every hyperparameter of the run: the general defaults, the optimizer's own, then ``overrides``."""
        return Recipe.of({**_DEFAULTS, **find_optimizer(self.optimizer, self.opt).classifier, **self.overrides})


def load_classify_config(**options: Any) -> ClassifyConfig:
    """A checked :class:`ClassifyConfig` from the names of its fields.

    Raises:
        UserError: an unknown option or hyperparameter, or a value outside its rule.
    """
    return checked(ClassifyConfig, options)
