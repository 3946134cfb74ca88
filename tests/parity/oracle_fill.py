"""The deterministic weights and images that the oracle numbers were made with (see tests/parity/oracle)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ORACLE = Path(__file__).parent / "oracle"


def load_models() -> dict[str, Any]:
    return json.loads((ORACLE / "models.json").read_text())


def uniform(seed: int, count: int) -> np.ndarray:
    """``count`` doubles in [0, 1) from a counter-based generator (SplitMix64)."""
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) + np.uint64(seed) * np.uint64(2**32) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def fill_weights(model: nn.Module, gain: float) -> None:
    """Overwrite every weight of a training model by the oracle's rule; ``gain`` is in models.json (fill_gain)."""
    for index, (key, tensor) in enumerate(model.state_dict().items()):
        if key.endswith(("anchors", "anchor_grid")):
            continue
        if key.endswith("num_batches_tracked"):
            tensor.zero_()
            continue
        w = 2 * uniform(index, tensor.numel()) - 1
        if key.endswith("running_mean"):
            w = 0.05 * w
        elif key.endswith("running_var"):
            w = 1 + 0.2 * np.abs(w)
        elif ".ia." in key:
            w = 0.02 * w
        elif ".im." in key:
            w = 1 + 0.02 * w
        elif tensor.ndim == 4:
            w = w * np.sqrt(3 * gain / np.prod(tensor.shape[1:]))
        elif key.endswith(".weight"):
            w = 1 + 0.1 * w
        else:
            w = 0.05 * w
        tensor.copy_(torch.from_numpy(w).view(tensor.shape))


def image_batch(oracle: Any) -> torch.Tensor:
    return torch.from_numpy(oracle["image_uint8"]).double() / 255
