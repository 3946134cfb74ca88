"""An Apple GPU has no float64: nothing but the optimizer's sums may need it on the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.one_step import batch, mini, state_of, step_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sp_yolo.eval import CocoEvaluator
from sp_yolo.experiments.classify import fit, load_classify_config, open_source
from sp_yolo.experiments.classify.splits import config_splits

WORDS = "Cannot convert a MPS Tensor to float64 dtype"


class NoDouble(TorchDispatchMode):
    """Refuses every operation with a float64 tensor in its result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in tree_leaves(result)):
            raise TypeError(WORDS)
        return result


class Elsewhere(TorchDispatchMode):
    """Tensors on the device "meta" are full of zeros; that device has no float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "meta":
            if given.get("dtype") == torch.float64:
                raise TypeError(WORDS)
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return func(*args, **given)


def test_an_iteration(tmp_path: Path) -> None:
    step = step_of(state_of(mini()), tmp_path, clip_norm=10.0)
    with NoDouble():
        step(batch())
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(1).double()


def test_classification() -> None:
    config = load_classify_config(dataset="toy", samples=40, epochs=1, optimizer="sgd", device="cpu")
    splits = config_splits(config, open_source("toy", None, download=False, image_size=32))
    with NoDouble():
        outcome = fit(config, splits)
    assert outcome.epochs[0]["train_loss"] > 0


def test_detections_come_from_the_device_before_they_are_widened() -> None:
    truth = {"images": [{"id": 1, "width": 9, "height": 9}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    evaluator = CocoEvaluator(truth, [1], ["a"])
    with Elsewhere():
        evaluator.update([1], [torch.empty(3, 6, device="meta")])
    assert evaluator.state()[1].shape == (3, 6)
