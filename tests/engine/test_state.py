"""A run that goes on in another precision than it was saved in: another device may choose it."""

from pathlib import Path

import pytest
import torch
from support.one_step import batch, mini, state_of, step_of

from sp_yolo.runtime.checkpoint import load_checkpoint, save_checkpoint


@pytest.mark.parametrize(
    ("saved", "now", "words"),
    [
        (False, True, "the run was saved without float16 and goes on with it: its loss scale starts anew"),
        (True, False, "the run was saved in float16 and goes on without: its loss scale is dropped"),
        (True, True, ""),
        (False, False, ""),
    ],
)
def test_a_loss_scale_comes_and_goes(tmp_path: Path, saved: bool, now: bool, words: str) -> None:
    before = state_of(mini(), scale=128.0 if saved else 0.0)
    step_of(before, tmp_path)(batch())
    save_checkpoint(tmp_path / "last.pt", before.everything({}))

    after = state_of(mini(), scale=512.0 if now else 0.0)
    assert after.restore(load_checkpoint(tmp_path / "last.pt"), "exp", 8) == words
    assert after.progress.iteration == 1
    for name, value in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], value)
    if now:
        assert after.scaler.get_scale() == (128.0 if saved else 512.0)
    assert step_of(after, tmp_path)(batch())  # it goes on
