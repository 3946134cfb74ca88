"""A study in miniature: does it run from end to end?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sp_yolo.engine.plan import DEFAULT_CFG
from sp_yolo.engine.splits import open_dataset
from sp_yolo.errors import UserError
from sp_yolo.experiments.compare.study import Study
from sp_yolo.experiments.compare.trials import thinned
from sp_yolo.models import build_model

# At most so many of each; of a detector's data, which may not be there, the generated ones take the place.
LEAST = {
    "classify": {"epochs": 3, "samples": 300},
    "detect": {"epochs": 1, "samples": 8, "val_samples": 8, "batch_size": 4},
}
TRIALS, SEEDS = {"classify": 3, "detect": 2}, {"classify": 3, "detect": 2}
DETECTOR = {"img_size": 64, "noplots": True, "nosave": True, "notest": True}
WIDTH = 0.25  # of a detector's layers
TOY = "data/toy.yaml"


def quick(study: Study, say: Callable[[str], None] = print) -> Study:
    """The same study with few seeds, trials, images and epochs, one seed per trial."""
    options = dict(study.options)
    for key, value in LEAST[study.task].items():
        options[key] = min(options.get(key) or value, value)
    if study.task == "detect":
        options |= {**DETECTOR, "data": _data(options, say)}
        if not options.get("weights"):
            options["cfg"] = {**build_model(options.get("cfg") or DEFAULT_CFG).yaml, "width_multiple": WIDTH}
    variants = [
        dataclasses.replace(variant, trials=thinned(variant.trials, TRIALS[study.task])) for variant in study.variants
    ]
    return dataclasses.replace(
        study,
        name=f"{study.name}-quick",
        options=options,
        variants=tuple(variants),
        seeds=min(study.seeds, SEEDS[study.task]),
        tuning_seeds=1,
    )


def _data(options: dict[str, Any], say: Callable[[str], None]) -> str:
    """The data of the study, or the generated ones where these are not on this machine."""
    data = str(options.get("data", TOY))
    if data == TOY:
        return data
    try:
        open_dataset(data, str(options.get("root", "")))
    except UserError as error:
        say(f"{error}; --quick takes {TOY} instead")
        return TOY
    return data
