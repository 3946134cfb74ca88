"""Suppression in tensors of fixed size against the host's own, which asks as often as it likes."""

from __future__ import annotations

import pytest
import torch
from support.pretend_cuda import PretendCuda

from sp_yolo import suppression
from sp_yolo.boxes import non_max_suppression


def predictions(classes: int, *, size: float = 640.0, images: int = 3, rows: int = 900) -> torch.Tensor:
    """[images, rows, 5 + classes]: clusters of boxes as a trained model makes them, some scores equal."""
    generator = torch.Generator().manual_seed(classes)
    centres = torch.rand(images, 30, 2, generator=generator) * size
    which = torch.randint(30, (images, rows, 1), generator=generator).expand(-1, -1, 2)
    xy = centres.gather(1, which) + torch.randn(images, rows, 2, generator=generator) * 8
    wh = torch.rand(images, rows, 2, generator=generator) * size / 10 + 20
    scores = (torch.rand(images, rows, 1 + classes, generator=generator) ** 3).mul(64).round().div(64)
    return torch.cat((xy, wh, scores), 2)


def on_pretended_gpu(prediction: torch.Tensor, *args: float, **options: object) -> tuple[list[torch.Tensor], list[str]]:
    with PretendCuda() as gpu:
        there = prediction.to("cuda:0")
        record = gpu.start()
        found = non_max_suppression(there, *args, **options)  # type: ignore[arg-type]
    return found, record.waits


@pytest.mark.parametrize(
    "options",
    [{}, {"multi_label": False}, {"agnostic": True}, {"classes": [0, 2]}, {"classes": []}, {"max_det": 20}],
    ids=str,
)
@pytest.mark.parametrize("classes", [1, 4])
def test_equals_the_hosts_with_one_wait(classes: int, options: dict[str, object]) -> None:
    prediction = predictions(classes)
    if classes == 1 and "classes" in options and options["classes"]:
        options = {"classes": [0]}
    found, waits = on_pretended_gpu(prediction, 0.2, 0.5, **options)
    wanted = non_max_suppression(prediction, 0.2, 0.5, **options)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert [len(each) for each in wanted] == [0, 0, 0] if options.get("classes") == [] else all(map(len, wanted))
    assert len(waits) == 1, waits


def test_boxes_wider_than_a_plane_and_half_precision() -> None:
    for prediction in (predictions(3, size=9000.0), predictions(3).half()):
        found, _ = on_pretended_gpu(prediction, 0.1, 0.5)
        wanted = non_max_suppression(prediction, 0.1, 0.5)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_nothing_is_found_where_nothing_is() -> None:
    assert [tuple(rows.shape) for rows in on_pretended_gpu(torch.zeros(2, 0, 8))[0]] == [(0, 6)] * 2
    assert [tuple(rows.shape) for rows in on_pretended_gpu(torch.zeros(2, 5, 8))[0]] == [(0, 6)] * 2


def test_nan_is_no_candidate() -> None:
    prediction = predictions(3)
    prediction[0, 5, 4], prediction[1, 7, 6] = torch.nan, torch.nan
    found, _ = on_pretended_gpu(prediction, 0.1, 0.5)
    assert all(
        torch.equal(a, b) for a, b in zip(found, non_max_suppression(prediction, 0.1, 0.5), strict=True)
    ) and all(rows.isfinite().all() for rows in found)


def test_a_chain_longer_than_the_rounds_is_left_to_the_host() -> None:
    """Each box overlaps its neighbours alone, so every second one survives; the last depends on all before it."""
    links = 2 * suppression.ROUNDS
    chain = torch.zeros(2, links, 6)
    chain[:, :, 0] = torch.arange(links) * 4.0
    chain[..., 2:4] = 10.0
    chain[:, :, 4] = torch.linspace(0.9, 0.5, links)
    chain[1, 4:] = 0  # this one is short
    found, waits = on_pretended_gpu(chain, 0.25, 0.4)
    assert [len(rows) for rows in found] == [links // 2, 2]
    assert found[0][:, 0].tolist() == [8.0 * i - 5 for i in range(links // 2)]
    assert len(waits) == 2  # the result, and the image that was not settled


def test_more_survivors_than_the_best_candidates_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The four best of each kept detection are one place: the survivors come later."""
    prediction = predictions(1, rows=400, images=1)
    prediction[0, :50, :4] = torch.tensor([100.0, 100.0, 50.0, 50.0])
    prediction[0, :50, 4] = 1.0
    found, waits = on_pretended_gpu(prediction, 0.01, 0.5, max_det=8)
    assert torch.equal(found[0], non_max_suppression(prediction, 0.01, 0.5, max_det=8)[0])
    assert len(waits) == 2


def test_images_are_taken_in_groups_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = on_pretended_gpu(predictions(4), 0.2, 0.5)
    monkeypatch.setattr(suppression, "ELEMENTS", 900 * 4 * 2)
    parts, waits = on_pretended_gpu(predictions(4), 0.2, 0.5)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True)) and len(waits) == 1
