"""Each patch for today's stack does what the host needs inside its block only."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from sp_yolo.plugins import compat


def test_removed_numpy_names() -> None:
    before = dict(vars(np))
    with compat.numpy_names():
        assert np.array([1.7, 2.2]).astype(np.int).tolist() == [1, 2]
        assert np.array([1]).astype(np.float).dtype == np.float64
        assert np.trapz([0.0, 1.0, 2.0], [0.0, 1.0, 3.0]) == pytest.approx(3.5)  # 0.5 + 1.5 * 2
        assert all(vars(np)[name] is value for name, value in before.items()), "names that exist stay"
    assert dict(vars(np)) == before


class Anything:
    pass


def test_whole_pickles(tmp_path: Path) -> None:
    torch.save({"model": Anything()}, tmp_path / "object.pt")
    with compat.whole_pickles():
        assert isinstance(torch.load(tmp_path / "object.pt")["model"], Anything)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "object.pt", weights_only=True)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "object.pt")


def test_empty_matches_lie_where_the_model_is() -> None:
    with compat.empty_matches(lambda: torch.device("cpu")):
        assert torch.tensor([], device="cuda:0", dtype=torch.int64).device.type == "cpu"
        assert torch.tensor([], device="meta").device.type == "meta"
        assert torch.tensor([1, 2], device="meta").device.type == "meta"
        assert torch.tensor([3]).tolist() == [3]
    with compat.empty_matches(lambda: torch.device("meta")):
        assert torch.tensor([], device="cuda:0").device.type == "meta"
        assert torch.tensor([], device="cpu").device.type == "cpu"


def test_sizes_drawn_with_whole_floats() -> None:
    with compat.integer_range():
        drawn = [random.randrange(160.0, 512.0) for _ in range(50)]
        assert all(isinstance(size, int) and 160 <= size < 512 for size in drawn)
        assert random.randrange(0.0, 10, 5) in (0, 5)
