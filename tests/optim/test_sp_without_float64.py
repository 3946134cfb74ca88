"""Devices that have no float64 (Apple's MPS): no tensor of that type is made there, and SP steps as elsewhere.

No such device is at hand; a CPU stands for it.
"""

import pytest
import torch
from sp_training import PRUNED, model_state, network, train, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sp_yolo.optim import SP, damping, multi_tensor


class NoFloat64(TorchDispatchMode):
    """Refuses what such a device refuses."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(result)):
            raise TypeError(f"{func} makes a float64")
        return result


@pytest.fixture
def like_mps(monkeypatch):
    monkeypatch.setattr(damping, "WITHOUT_FLOAT64", ("cpu",))
    monkeypatch.setattr(multi_tensor, "SEGMENTED", ())


@pytest.mark.parametrize(
    "settings",
    [PRUNED, {"metric": "none"}, {"capturable": True}, {"lr": torch.tensor(0.01)}, {"mode": "paper", "sigma": 0.2}],
    ids=str,
)
def test_no_float64_is_made(settings, like_mps):
    model = network()
    optimizer = SP(model.parameters(), foreach=True, **settings)
    with NoFloat64():
        train(model, optimizer, 6)
    assert optimizer.path == "multi-tensor" and bool(torch.isfinite(weights(model)).all())


def test_a_float64_would_be_seen():
    model = network()
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        train(model, SP(model.parameters(), foreach=True), 1)


def test_the_steps_are_those_of_other_devices(like_mps, monkeypatch):
    """But for the rounding of sums; and a state from there is continued here, and back."""
    model, other = network(), network()
    short = SP(model.parameters(), foreach=True, **PRUNED)
    train(model, short, 8)
    monkeypatch.undo()
    full = SP(other.parameters(), foreach=True, **PRUNED)
    train(other, full, 8)
    assert torch.allclose(weights(model), weights(other), rtol=1e-4, atol=1e-6)
    assert model_state(short) == pytest.approx(model_state(full), rel=1e-3)
    monkeypatch.setattr(damping, "WITHOUT_FLOAT64", ("cpu",))
    model.load_state_dict(other.state_dict())
    short.load_state_dict(full.state_dict())
    with NoFloat64():
        train(model, short, 4, first=8)
    monkeypatch.undo()
    full.load_state_dict(short.state_dict())
    train(other, full, 4, first=8)
    assert {state["secant"].dtype for state in full.state.values()} == {torch.float64}
    assert full.param_groups[0]["gamma"].dtype == torch.float64
