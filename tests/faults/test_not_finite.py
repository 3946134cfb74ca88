"""NaN and infinity: the run stops before the step, names what, when and which images, and keeps the batch."""

from typing import Any

import numpy as np
import pytest
import torch
from support.launcher import Runs, fingerprint, one_error

from sp_yolo.engine.finite import LAG, FiniteWatch, norms


def spoil_loss(iteration: int, value: float) -> None:
    from sp_yolo.losses import DetectionLoss

    call, calls = DetectionLoss.__call__, []

    def spoiled(loss: DetectionLoss, *arguments: Any) -> Any:
        total, parts = call(loss, *arguments)
        calls.append(1)
        if len(calls) == iteration + 1:
            return total * value, parts._replace(obj=parts.obj * value, total=parts.total * value)
        return total, parts

    DetectionLoss.__call__ = spoiled  # type: ignore[method-assign]


def spoil_gradient(iteration: int, value: float) -> None:
    from sp_yolo.engine.step import TrainStep

    init = TrainStep.__init__

    def with_hook(step: TrainStep, *arguments: Any) -> None:
        init(step, *arguments)
        weight = dict(step.state.model.named_parameters())["model.2.conv.weight"]
        weight.register_hook(
            lambda gradient: gradient * value if step.state.progress.iteration == iteration else gradient
        )

    TrainStep.__init__ = with_hook  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [(spoil_loss, "obj loss, total loss not finite"), (spoil_gradient, "gradient of model.2.conv.weight not finite")],
    ids=["loss", "gradient"],
)
def test_not_finite(runs: Runs, spoil: Any, named: str, value: float) -> None:
    code, output = runs.train("--save-every", "1e-9", fault=(spoil, (3, value)))
    assert code == 4
    words = one_error(output)
    run = runs.weights().parent
    assert f"{named} at iteration 3, stopped before the step; batch of train_" in words
    assert "kept in runs/train/exp/nonfinite_000003.npz" in words and "lr0 (now 0.01)" in words
    with np.load(run / "nonfinite_000003.npz", allow_pickle=False) as kept:
        assert kept["images"].shape == (4, 3, 64, 64) and kept["images"].dtype == np.uint8
        assert kept["targets"].shape[1] == 6
        assert all(str(path).rpartition("/")[2] in words for path in kept["paths"])
    # the state is that of the iteration before, and it is sound: without the fault the run ends as it should
    last = runs.weights() / "last.pt"
    assert torch.load(last, weights_only=True)["progress"]["iteration"] == 3
    code, output = runs.resume(last)
    assert code == 0, output
    code, output = runs.train("--name", "whole")
    assert code == 0 and fingerprint(last) == fingerprint(runs.weights("whole") / "last.pt")


def test_a_gradient_summed_over_batches_is_seen_at_the_batch_that_spoils_it(runs: Runs) -> None:
    flags = ("--set", "nominal_batch=64", "--set", "warmup_epochs=0")
    code, output = runs.train(*flags, fault=(spoil_gradient, (2, float("nan"))))
    assert code == 4 and "at iteration 2, " in one_error(output)


def test_norms() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, float("nan")]), torch.tensor([[float("-inf")], [1.0]])]
    found = norms(tensors)
    assert found[0] == 5 and not torch.isfinite(found[1:]).any()


class Found(Exception):
    pass


def test_watch_names_the_batch_it_looked_at() -> None:
    def fault(names: list[str], iteration: int, batch: Any) -> Any:
        raise Found(names, iteration, batch)

    watch = FiniteWatch(fault)
    watch.look(["a", "b"], torch.tensor([1.0, 2.0]), 0, "first")
    with pytest.raises(Found) as caught:
        watch.look(["a", "b"], torch.tensor([1.0, float("inf")]), 1, "second")
    assert caught.value.args == (["b"], 1, "second")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: there the answer comes some iterations later")
def test_watch_on_a_gpu_asks_without_waiting_and_drains() -> None:
    def fault(names: list[str], iteration: int, batch: Any) -> Any:
        raise Found(names, iteration, batch)

    watch = FiniteWatch(fault)
    values = [torch.tensor([float("nan") if iteration == 1 else 1.0], device="cuda") for iteration in range(LAG)]
    torch.cuda._sleep(10**9)  # the GPU is busy: nothing can be answered yet
    for iteration in range(LAG):
        watch.look(["a"], values[iteration], iteration, iteration)
    with pytest.raises(Found) as caught:
        watch.drain()
    assert caught.value.args == (["a"], 1, 1)
