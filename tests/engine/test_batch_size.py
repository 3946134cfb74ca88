"""--batch-size auto: what an image takes, counted by hand on one layer; what fits, on memory that is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.launcher import OPTIONS
from support.networks import mini

from sp_yolo import Trainer
from sp_yolo.engine import batch_size
from sp_yolo.engine.batch_size import BESIDE, COPIES, USED, bytes_per_image, fitting_batch, free_memory
from sp_yolo.engine.inputs import class_weights
from sp_yolo.engine.summary import model_facts
from sp_yolo.errors import EnvironmentFault
from sp_yolo.models import build_model
from sp_yolo.runtime.device import select_compute

CPU = select_compute("cpu", "off")


def test_bytes_of_one_layer_by_hand() -> None:
    """3 -> 8 channels, 1x1, stride 8, then BatchNorm, SiLU, the head's 1x1 convolution of 7 outputs."""
    rows = {"backbone": [[-1, 1, "Conv", [8, 1, 8]]], "head": [[[0], 1, "Detect", ["nc", "anchors"]]]}
    model = build_model({"nc": 2, "anchors": [[10, 10]], **rows})
    image, cells = 3 * 64 * 64 * 4, 8 * 8 * 8 * 4
    # What backward needs: the image, the input of BatchNorm, that of SiLU, that of the head.
    assert bytes_per_image(model, 64, CPU) == pytest.approx(BESIDE * (image + 3 * cells), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), build_model(model.yaml).buffers(), strict=True))


@pytest.mark.parametrize(("images", "wanted"), [(1.5, 1), (7.9, 7), (8.5, 8), (23.9, 16), (1000, 64)])
def test_what_fits(images: float, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mini()
    weights = COPIES * 4 * sum(parameter.numel() for parameter in model.parameters())
    free = (images * bytes_per_image(model, 64, CPU) + weights) / USED
    monkeypatch.setattr(batch_size, "free_memory", lambda compute: free)
    assert fitting_batch(model, 64, CPU) == wanted
    monkeypatch.setattr(batch_size, "free_memory", lambda compute: weights)
    with pytest.raises(EnvironmentFault, match="--batch-size auto: not one image of 64 px fits"):
        fitting_batch(model, 64, CPU)


def test_memory_is_told_here() -> None:
    assert 2**26 < free_memory(CPU) < 2**50


def test_a_run_with_auto_that_is_out_of_time(
    toy_yaml: Path, mini_cfg: str, tmp_path: Path, quick_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time left: one epoch, its summary and report; it goes on with the batch size that it found."""
    monkeypatch.setattr("sp_yolo.engine.plan.fitting_batch", lambda model, size, compute: 4 if size == 64 else 0)
    options = {**OPTIONS, "data": str(toy_yaml), "cfg": mini_cfg, "project": str(tmp_path), "epochs": 3}
    trainer = Trainer.new(**{**options, "batch_size": "auto"}, max_minutes=0.0, class_weights=True, noplots=True)
    summary = trainer.fit()
    assert trainer.options.batch_size == 4 and summary["final"]["epoch"] == 0
    assert trainer.best_weights == tmp_path / "exp" / "weights" / "best.pt" and trainer.best_weights.is_file()
    resumed = Trainer.resume(str(tmp_path / "exp"), max_minutes=1000.0, noplots=True)
    assert resumed.options.batch_size == 4 and resumed.options.class_weights
    assert resumed.fit()["final"]["epoch"] == 2


def test_class_weights_by_hand() -> None:
    labels = [np.zeros((100, 5)), np.ones((25, 5))]
    found = class_weights(labels, 3)
    assert found == pytest.approx([5 / 6, 5 / 3, 1.0])  # four times rarer counts twice; 1 on average over the labels


def test_operations_and_parameters_are_the_published_ones() -> None:
    """yolov7-tiny with COCO's classes: 6.2 million parameters, at 640 px 13.8 GFLOPs (the paper); four times 320 px."""
    facts = model_facts(build_model("yolov7-tiny").eval(), 320)
    assert facts["parameters"].startswith("6.2")
    assert 4 * float(facts["operations"].split()[0]) == pytest.approx(13.8, abs=0.6)
