"""``mode="paper"``: a captured CUDA graph replays on the state's memory, so that no step may put it elsewhere."""

import pytest
import torch
from sp_training import network, train

from sp_yolo.optim import SP


@pytest.mark.parametrize("settings", [{"foreach": True}, {"foreach": False}, {"foreach": True, "sigma": 0.3}], ids=str)
def test_the_state_stays_where_it_is(settings):
    model = network()
    optimizer = SP(model.parameters(), mode="paper", **settings)
    train(model, optimizer, 1)
    before = [{name: (v, v.data_ptr(), v.clone()) for name, v in s.items()} for s in optimizer.state.values()]
    train(model, optimizer, 2, first=1)
    for state, earlier in zip(optimizer.state.values(), before, strict=True):
        assert state.keys() == {"momentum_buffer", "displacement", "displacement_gradient"}
        for name, value in state.items():
            same, address, content = earlier[name]
            assert value is same and value.data_ptr() == address
            assert not torch.equal(value, content)  # it was written there
