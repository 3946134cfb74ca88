"""Each patch for today's stack does what the host needs inside its block only."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.pretend_cuda import Mismatch, PretendCuda

from sp_yolo.errors import UserError
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


def test_one_row_to_choose_from() -> None:
    with compat.choice_among_none():
        assert random.choices([3, 4, 5], weights=np.zeros(3)) == [5]  # as Python 3.8 did
        assert random.choices([3, 4], weights=[1, 0], k=4) == [3] * 4
        assert random.choices([3]) == [3]
    with pytest.raises(ValueError, match="greater than zero"):
        random.choices([3], weights=[0.0])


def test_layers_of_the_auxiliary_loss_on_a_gpu() -> None:
    """As in its matching: the layer of each candidate is kept on the CPU, which of them matched is known on the GPU."""
    with PretendCuda():
        layer = torch.arange(4.0)
        matched = torch.tensor([True, False, True, False], device="cuda")
        targets = torch.tensor([7.0, 8.0, 9.0, 6.0], device="cuda")[matched]
        with pytest.raises(Mismatch):
            layer[matched]
        with compat.indices_follow():
            chosen = layer[matched]
            assert chosen.tolist() == [0.0, 2.0]
            assert targets[chosen == 2].tolist() == [9.0]
            assert layer[1:3].tolist() == [1.0, 2.0]
        with pytest.raises(Mismatch):
            layer[matched]


def test_hyp_files_to_evolve_from() -> None:
    with compat.evolvable_hyp():
        assert yaml.load("{lr0: 0.1, loss_ota: 1}", Loader=yaml.SafeLoader) == {"lr0": 0.1}
        assert yaml.load("{nc: 1, loss_ota: 1}", Loader=yaml.SafeLoader) == {"nc": 1, "loss_ota": 1}
        with pytest.raises(UserError, match="--evolve with loss_ota: 0"):
            yaml.load("{lr0: 0.1, loss_ota: 0}", Loader=yaml.SafeLoader)
