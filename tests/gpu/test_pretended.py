"""A training iteration on a pretended GPU: devices, host waits, launches and bytes, without a GPU.

Budgets are launches: a multi-tensor operation counts as many as torch's CUDA kernel of it takes.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from support.pretend_cuda import CUDA, Mismatch, PretendCuda, Record, backward_waits
from training_rig import CLASSES, PRECISIONS, SIZES, Rig, make_batch, make_model, move

from sp_yolo import boxes
from sp_yolo.config import LossRecipe
from sp_yolo.losses import DetectionLoss, detection

# Calls: a multi-tensor operation is a launch for every 36 to 110 tensors, beyond 20 million elements for fewer.
OPTIMIZER_CALLS, EMA_CALLS = 60, 4
LOSS_LAUNCHES = 250  # forward, for each of the assignments: auxiliary heads have two
SCALER_WAITS = 1  # of float16: GradScaler asks whether a gradient overflowed
PAIR_BYTES = 230  # that the assignment moves for each pair of a target and a candidate


@functools.cache
def iterations(name: str) -> dict[str, Record]:
    """The record of an iteration in each precision, none of them the run's first."""
    batch, size, records = make_batch(SIZES[name]), SIZES[name], {}
    with PretendCuda() as gpu:
        batch = batch._replace(images=batch.images.pin_memory())
        rig = Rig(make_model(name), size, CUDA, "fp32")
        rig.count_in_phases(gpu)
        rig.step(batch)
        for precision in PRECISIONS:
            rig.set_precision(precision)
            records[precision] = gpu.start()
            rig.step(batch)
        records["detect"] = gpu.start()
        rig.detect(batch)
    return records


@pytest.fixture(params=list(SIZES))
def records(request: pytest.FixtureRequest) -> dict[str, Record]:
    return iterations(request.param)


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_an_iteration_waits_for_nothing(records: dict[str, Record], precision: str) -> None:
    waits = records[precision].waits
    allowed = SCALER_WAITS if precision == "fp16" else 0
    assert len(waits) <= allowed, waits


def test_launches_of_the_loss(records: dict[str, Record], request: pytest.FixtureRequest) -> None:
    assignments = 2 if "w6" in request.node.name else 1
    assert 0 < records["bf16"].launches["loss"] <= assignments * LOSS_LAUNCHES


def test_calls_of_the_optimizer(records: dict[str, Record]) -> None:
    """Of the multi-tensor path; the Triton path needs a real GPU."""
    assert 0 < records["fp32"].operations["optimizer"] <= OPTIMIZER_CALLS


def test_a_validated_batch_waits_once(records: dict[str, Record]) -> None:
    assert len(records["detect"].waits) == 1, records["detect"].waits


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_calls_of_the_average(records: dict[str, Record], precision: str) -> None:
    assert 0 < records[precision].operations["ema"] <= EMA_CALLS


def test_losses_are_the_cpus() -> None:
    name, batch = "yolov7-tiny", make_batch(64)
    plain = Rig(make_model(name), 64, torch.device("cpu"), "fp32")
    for _ in range(2):
        plain.step(batch)
    with PretendCuda():
        rig = Rig(make_model(name), 64, CUDA, "fp32")
        pinned = batch._replace(images=batch.images.pin_memory())
        for _ in range(2):
            rig.step(pinned)
        sums = rig.state.losses.sums.cpu()
    assert torch.allclose(sums, plain.state.losses.sums, rtol=1e-5)


def test_no_wait_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a profile of plain tensors on an accelerator's branches."""
    monkeypatch.setattr(boxes, "asking_is_free", lambda _: False)
    monkeypatch.setattr(detection, "asking_is_free", lambda _: False)
    rig = Rig(make_model("yolov7-tiny"), 64, torch.device("cpu"), "fp32")
    batch = make_batch(64)
    loss, _ = rig.loss(rig.model(batch.images.float() / 255), batch.targets, (64, 64))
    assert backward_waits(loss) == []


def test_crowded_images_move_bounded_memory() -> None:
    """By what can be a candidate: of each anchor that fits a target 3 cells, for auxiliary heads 5; not 5 of each."""
    name, size, boxes = "yolov7-w6", 640, 300
    batch = make_batch(size, 1, boxes)
    with PretendCuda() as gpu:
        model = move(make_model(name), CUDA)
        anchors, strides = model.head.anchors.value.numpy(), model.stride.numpy()
        loss = DetectionLoss(model, LossRecipe(), size)
        shapes = [(1, 3, int(size / s), int(size / s), CLASSES + 5) for s in strides] * 2
        maps = [torch.randn(shape, device=CUDA) for shape in shapes]
        record = gpu.start()
        loss(maps, batch.targets, (size, size))
    ratio = batch.targets[:, None, None, 4:].numpy() * size / (anchors * strides[:, None, None])[None]
    fits = int((np.maximum(ratio, 1 / ratio).max(-1) < LossRecipe().anchor_t).sum())
    pairs = boxes * (3 + 5) * fits
    read_once = 4 * sum(map(math.prod, shapes))
    assert record.moved["rest"] <= PAIR_BYTES * pairs + 20 * read_once
    assert pairs < boxes * 2 * (5 * 12 * boxes) / 2  # the bound excludes tables padded to all anchors and cells


# ------------------------------------------------------------------------------------------------- the tester is tested
def test_a_wait_in_the_backward_pass_is_seen() -> None:
    x = torch.rand(4, 2, requires_grad=True)
    assert "aten::item" in backward_waits(x.prod(1).sum())


def test_an_injected_mismatch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = detection.complete_iou
    monkeypatch.setattr(detection, "complete_iou", lambda a, b: real(a, b.cpu()) if b.is_cuda else real(a, b))
    with PretendCuda():
        rig = Rig(make_model("yolov7-tiny"), 64, CUDA, "fp32")
        with pytest.raises(Mismatch, match="same device"):
            rig.step(make_batch(64))


def test_an_injected_question_about_gamma_is_seen() -> None:
    with PretendCuda() as gpu:
        rig = Rig(make_model("yolov7-tiny"), 64, CUDA, "fp32")
        rig.count_in_phases(gpu)
        plain = rig.optimizer.step

        def asking() -> None:
            plain()
            float(rig.optimizer.param_groups[0]["gamma"])

        rig.optimizer.step = asking  # type: ignore[method-assign]
        batch = make_batch(64)
        batch = batch._replace(images=batch.images.pin_memory())
        rig.step(batch)
        record = gpu.start()
        rig.step(batch)
    assert record.waits == ["rest: _local_scalar_dense"]


@pytest.mark.parametrize(
    ("ask", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0.5], 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), 1),
        (lambda x: torch.tensor([1.0, 2.0]).to(x.device, non_blocking=True), 0),
        (lambda x: torch.zeros(100_000).to(x.device, non_blocking=True), 1),
        (lambda x: torch.zeros(100_000).pin_memory().to(x.device, non_blocking=True), 0),
        (lambda x: x[torch.tensor([0, 1])], 1),
        (lambda x: x[:2] * 2 + torch.tensor(3.0), 0),
    ],
)
def test_what_counts_as_a_wait(ask: object, waits: int) -> None:
    with PretendCuda() as gpu:
        x = torch.rand(8, device=CUDA)
        record = gpu.start()
        ask(x)  # type: ignore[operator]
    assert len(record.waits) == waits, record.waits


def test_launches_and_bytes_by_hand() -> None:
    with PretendCuda() as gpu:
        x, many = torch.rand(1000, device=CUDA), [torch.rand(3, device=CUDA) for _ in range(130)]
        record = gpu.start()
        (x.view(10, 100).t() * 2).sum()
        assert (record.launches["rest"], record.moved["rest"]) == (2, 8000 + 4004)
        record = gpu.start()
        torch._foreach_lerp_(many, [t.clone() for t in many], 0.5)
        assert record.launches["rest"] == 130 + 3  # 64 tensors in a launch of two lists
