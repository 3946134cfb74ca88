"""A study of seconds."""

from pathlib import Path

import pytest

from sp_yolo.experiments.compare.study import Study, Variant, make_study


@pytest.fixture
def tiny_study(tiny_npz: Path) -> Study:
    options = {"dataset": str(tiny_npz), "samples": 60, "epochs": 2, "batch_size": 20}
    variants = [Variant("sp", "sp", {"lr0": (0.1, 0.3)}), Variant("sgd", "sgd", {"lr0": (0.01, 0.05)})]
    return make_study("tiny", task="classify", options=options, variants=variants, seeds=2, tuning_seeds=1)
