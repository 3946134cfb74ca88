"""Box formats, IoU, CIoU, letterbox and NMS against hand calculation, float64 NumPy and torchvision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision

from sp_yolo.boxes import (
    MAX_CANDIDATES,
    box_iou,
    boxes_to_original,
    complete_iou,
    cxcywh_to_xyxy,
    letterbox,
    non_max_suppression,
    xyxy_to_cxcywh,
)


def random_boxes(n: int, seed: int, size: float = 300.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, 2, generator=generator) * size
    return torch.cat((centre, 1 + torch.rand(n, 2, generator=generator) * size / 3), 1)


def random_prediction(batch: int, rows: int, num_classes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    boxes = random_boxes(batch * rows, seed).view(batch, rows, 4)
    return torch.cat((boxes, torch.rand(batch, rows, 1 + num_classes, generator=generator)), 2)


def test_formats_by_hand_in_torch_and_numpy() -> None:
    corners = [[0.0, 10.0, 4.0, 16.0], [-2.0, -2.0, 2.0, 0.0]]
    centres = [[2.0, 13.0, 4.0, 6.0], [0.0, -1.0, 4.0, 2.0]]
    assert xyxy_to_cxcywh(torch.tensor(corners)).tolist() == centres
    assert cxcywh_to_xyxy(torch.tensor(centres)).tolist() == corners
    assert xyxy_to_cxcywh(np.array([corners])).tolist() == [centres]
    as_array = cxcywh_to_xyxy(np.array(centres, dtype=np.float32))
    assert isinstance(as_array, np.ndarray) and as_array.dtype == np.float32 and as_array.tolist() == corners
    assert cxcywh_to_xyxy(torch.zeros(0, 4)).shape == (0, 4)


def test_box_iou_equals_torchvision() -> None:
    a, b = cxcywh_to_xyxy(random_boxes(40, 0)), cxcywh_to_xyxy(random_boxes(30, 1))
    expected = torchvision.ops.box_iou(a.double(), b.double())
    assert (expected > 0).sum() > 50
    torch.testing.assert_close(box_iou(a, b).double(), expected, rtol=1e-5, atol=1e-6)
    assert box_iou(a, a).diagonal().allclose(torch.ones(40))
    assert box_iou(a[:0], b).shape == (0, 30)


def ciou_in_float64(pred: np.ndarray, target: np.ndarray) -> float:
    """Scalar transcription of the published formula with epsilons of 1e-7, one box pair."""
    eps = 1e-7
    (px, py, pw, ph), (tx, ty, tw, th) = pred, target
    left, right = max(px - pw / 2, tx - tw / 2), min(px + pw / 2, tx + tw / 2)
    top, bottom = max(py - ph / 2, ty - th / 2), min(py + ph / 2, ty + th / 2)
    overlap = max(right - left, 0.0) * max(bottom - top, 0.0)
    h1, h2 = ph + eps, th + eps
    iou = overlap / (pw * h1 + tw * h2 - overlap + eps)
    hull_w = max(px + pw / 2, tx + tw / 2) - min(px - pw / 2, tx - tw / 2)
    hull_h = max(py + ph / 2, ty + th / 2) - min(py - ph / 2, ty - th / 2)
    distance = ((px - tx) ** 2 + (py - ty) ** 2) / (hull_w**2 + hull_h**2 + eps)
    v = 4 / math.pi**2 * (math.atan(tw / (h2 + eps)) - math.atan(pw / (h1 + eps))) ** 2
    return iou - distance - v * v / (v - iou + 1 + eps)


def test_complete_iou_equals_float64_transcription() -> None:
    pred, target = random_boxes(200, 2, 30).double(), random_boxes(200, 3, 30).double()
    target[:50] = pred[:50] * (1 + 0.1 * random_boxes(50, 4, 1).double())
    expected = [ciou_in_float64(p, t) for p, t in zip(pred.numpy(), target.numpy(), strict=True)]
    assert min(expected) < -0.3 and max(expected) > 0.5
    np.testing.assert_allclose(complete_iou(pred, target).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_complete_iou_by_hand_and_without_gradient_through_alpha() -> None:
    # two concentric boxes 2x2 and 4x4: IoU 1/4, no distance, same aspect -> CIoU 1/4
    value = complete_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 4.0, 4.0]]))
    assert value.item() == pytest.approx(0.25, abs=1e-6)

    # the gradient is the one of iou - distance - alpha*v with alpha a constant, by central differences
    pred = torch.tensor([[1.0, 2.0, 3.0, 5.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.5, 1.0, 4.0, 3.0]], dtype=torch.float64)
    complete_iou(pred, target).sum().backward()
    p, t = pred.detach().numpy()[0], target.numpy()[0]

    def aspect(box: np.ndarray) -> float:
        return 4 / math.pi**2 * (math.atan(t[2] / t[3]) - math.atan(box[2] / box[3])) ** 2

    def iou_of(box: np.ndarray) -> float:
        a, b = (cxcywh_to_xyxy(torch.from_numpy(x)[None]) for x in (box, t))
        return torchvision.ops.box_iou(a, b).item()

    alpha = aspect(p) / (aspect(p) - iou_of(p) + 1)
    numeric = []
    for i in range(4):
        step = np.zeros(4)
        step[i] = 1e-5
        values = []
        for box in (p + step, p - step):
            # ciou with its own alpha, plus the difference to the frozen alpha
            own = aspect(box) / (aspect(box) - iou_of(box) + 1)
            values.append(ciou_in_float64(box, t) + (own - alpha) * aspect(box))
        numeric.append((values[0] - values[1]) / 2e-5)
    assert pred.grad is not None
    np.testing.assert_allclose(pred.grad.numpy()[0], numeric, rtol=1e-4, atol=1e-6)


def test_letterbox_then_back_is_the_identity() -> None:
    for height, width in ((333, 500), (500, 333), (480, 640), (37, 41)):
        image = np.zeros((height, width, 3), np.uint8)
        boxed, ratio, (pad_w, pad_h) = letterbox(image, (320, 416))
        assert boxed.shape == (320, 416, 3)
        original = torch.tensor([[3.0, 5.0, 30.0, 36.0], [0.0, 0.0, width, height]])
        placed = original * ratio + torch.tensor([pad_w, pad_h, pad_w, pad_h])
        back = boxes_to_original(placed, (320, 416), (height, width), ((ratio, ratio), (pad_w, pad_h)))
        torch.testing.assert_close(back, original, rtol=1e-4, atol=1e-3)


def test_letterbox_of_a_thread_thin_image_keeps_one_pixel() -> None:
    boxed, _, _ = letterbox(np.full((1, 4000, 3), 7, np.uint8), 64)
    assert boxed.shape == (64, 64, 3) and (boxed == 7).any()


def test_boxes_to_original_uses_each_axis_own_ratio_and_clips() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0], [-50.0, -50.0, 900.0, 900.0]])
    back = boxes_to_original(boxes, (64, 64), (100, 60), ((0.5, 0.25), (2.0, 4.0)))
    assert back.tolist() == [[32.0, 32.0, 60.0, 72.0], [0.0, 0.0, 60.0, 100.0]]
    assert boxes_to_original(boxes[:0], (64, 64), (100, 60)).shape == (0, 4)


def nms_by_definition(rows: np.ndarray, conf: float, iou: float, max_det: int) -> list[list[float]]:
    """Greedy multi-label NMS of one image in float64, straight from the definition."""
    candidates = []
    for row in rows.astype(np.float64):
        for label, probability in enumerate(row[5:]):
            score = float(np.float32(row[4]) * np.float32(probability))
            if row[4] > conf and score > conf:
                candidates.append((score, label, row[:4]))
    kept: list[tuple[float, int, np.ndarray]] = []
    for score, label, box in sorted(candidates, key=lambda c: -c[0]):
        corner = cxcywh_to_xyxy(box)
        for _, other_label, other in kept:
            if other_label != label:
                continue
            size = np.minimum(corner[2:], other[2:]) - np.maximum(corner[:2], other[:2])
            inter = float(np.prod(np.maximum(size, 0)))
            if inter / (np.prod(corner[2:] - corner[:2]) + np.prod(other[2:] - other[:2]) - inter) > iou:
                break
        else:
            kept.append((score, label, corner))
    return [[*box.tolist(), score, float(label)] for score, label, box in kept[:max_det]]


@pytest.mark.parametrize("max_det", [5, 40, 1000])
def test_nms_equals_the_definition(max_det: int) -> None:
    prediction = random_prediction(2, 150, 3, seed=5)
    result = non_max_suppression(prediction, 0.2, 0.3, max_det=max_det)
    for rows, found in zip(prediction.numpy(), result, strict=True):
        expected = nms_by_definition(rows, 0.2, 0.3, max_det)
        assert len(expected) == max_det or (max_det == 1000 and 50 < len(expected) < 450)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_nms_prefixes_give_the_result_of_one_full_pass() -> None:
    # heavy overlap: far more than 4 * max_det candidates must be looked at before max_det survive
    prediction = random_prediction(1, 3000, 2, seed=6)
    prediction[..., :2] = 150 + (prediction[..., :2] - 150) * 0.2
    found = non_max_suppression(prediction, 0.01, 0.3, max_det=30)[0]
    everything = non_max_suppression(prediction, 0.01, 0.3, max_det=100000)[0]
    assert len(found) == 30 < len(everything)
    assert torch.equal(found, everything[:30])


def test_nms_in_bf16_is_the_float32_result_of_the_same_numbers() -> None:
    prediction = random_prediction(2, 200, 4, seed=7).bfloat16()
    prediction[0, 0, 4] = torch.tensor(0.001).bfloat16()  # rounds to just above the threshold
    low = non_max_suppression(prediction, 0.001, 0.5, max_det=2000)
    high = non_max_suppression(prediction.float(), 0.001, 0.5, max_det=2000)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(low, high, strict=True))


def test_nms_one_class_scores_by_objectness_alone() -> None:
    prediction = torch.tensor([[[50.0, 50, 10, 10, 0.6, 0.1], [80.0, 80, 10, 10, 0.3, 0.9]]])
    assert non_max_suppression(prediction, 0.4, 0.5)[0].tolist() == [pytest.approx([45, 45, 55, 55, 0.6, 0])]


def test_nms_classes_agnostic_and_best_label() -> None:
    row = [50.0, 50, 10, 10, 1.0, 0.3, 0.9, 0.8]
    prediction = torch.tensor([[row]])
    assert non_max_suppression(prediction, 0.25, 0.5)[0][:, 5].tolist() == [1, 2, 0]
    assert non_max_suppression(prediction, 0.25, 0.5, multi_label=False)[0][:, 5].tolist() == [1]
    assert non_max_suppression(prediction, 0.25, 0.5, classes=[0, 2])[0][:, 5].tolist() == [2, 0]
    assert non_max_suppression(prediction, 0.25, 0.5, classes=[])[0].shape == (0, 6)
    assert non_max_suppression(prediction, 0.25, 0.5, agnostic=True)[0][:, 5].tolist() == [1]


def test_nms_thresholds_are_strict() -> None:
    same = [50.0, 50, 10, 10]
    prediction = torch.tensor([[[*same, 0.5, 1.0, 0.5], [100.0, 100, 8, 8, 0.5, 0.25, 1.0]]])
    kept = non_max_suppression(prediction, 0.25, 0.5)[0]
    assert kept[:, 4].tolist() == [0.5, 0.5]  # 0.5 * 0.5 is not above 0.25; 0.5 * 0.25 is below
    # two boxes with an IoU of exactly 1/2 both stay at the threshold 1/2
    half = torch.tensor([[[4.0, 4, 8, 8, 0.9, 1.0], [4.0, 2, 8, 4, 0.8, 1.0]]])
    assert len(non_max_suppression(half, 0.1, 0.5)[0]) == 2
    assert len(non_max_suppression(half, 0.1, 0.4999)[0]) == 1


def test_nms_classes_do_not_touch_beyond_4096_pixels() -> None:
    # class 0 at x = 4146 lies where class 1's plane would put x = 50
    prediction = torch.tensor([[[4146.0, 4146, 20, 20, 1.0, 0.9, 0.0], [50.0, 50, 20, 20, 1.0, 0.0, 0.8]]])
    assert len(non_max_suppression(prediction, 0.25, 0.5)[0]) == 2


def test_nms_keeps_the_best_of_too_many_candidates() -> None:
    # a row of MAX_CANDIDATES + 10 far-apart boxes with rising scores: the ten worst never become candidates
    count = MAX_CANDIDATES + 10
    prediction = torch.zeros(1, count, 6)
    prediction[0, :, 0] = torch.arange(count) * 4.0
    prediction[0, :, 2:4] = 2.0
    prediction[0, :, 4] = torch.linspace(0.1, 0.9, count)
    kept = non_max_suppression(prediction, 0.01, 0.5, max_det=count)[0]
    assert len(kept) == MAX_CANDIDATES
    assert kept[-1, 4] == prediction[0, 10, 4]


def test_nms_drops_nan_scores_and_takes_empty_input() -> None:
    prediction = random_prediction(1, 20, 3, seed=8)
    clean = non_max_suppression(prediction[:, 1:], 0.1, 0.5)[0]
    prediction[0, 0, 4] = float("nan")
    assert torch.equal(non_max_suppression(prediction, 0.1, 0.5)[0], clean)
    assert [tuple(r.shape) for r in non_max_suppression(torch.zeros(2, 0, 8))] == [(0, 6), (0, 6)]


def test_nms_of_a_batch_equals_single_images() -> None:
    prediction = random_prediction(3, 100, 4, seed=9)
    together = non_max_suppression(prediction, 0.05, 0.6)
    alone = [non_max_suppression(p[None], 0.05, 0.6)[0] for p in prediction]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
