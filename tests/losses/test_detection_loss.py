"""DetectionLoss against the plain per-image reference and against its own promises (devices, types, sizes, errors)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from loss_settings import HYP, Setting
from support import loss_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sp_yolo.config import LossRecipe
from sp_yolo.losses import DetectionLoss, LossParts, assign, detection, scale_gains

VARIANTS = {
    "plain": {},
    "focal": {"fl_gamma": 1.5},
    "smooth": {"label_smoothing": 0.1},
    "weighted": {"cls_pw": 1.5, "obj_pw": 0.8, "anchor_t": 2.5},
    "all": {"fl_gamma": 2.0, "label_smoothing": 0.05, "cls_pw": 0.7, "obj_pw": 2.0},
}


def expected(setting: Setting, kind: str) -> tuple[Tensor, list[Tensor], Tensor]:
    hyp = setting.hyp | setting.criterion().gains._asdict()
    loss, items = loss_reference.loss(
        setting.maps, setting.targets, hyp, setting.anchors, setting.stride.tolist(), setting.image_hw, kind=kind
    )
    return loss.detach(), list(torch.autograd.grad(loss, setting.maps)), items


def assert_same(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]], rtol: float = 2e-5) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=0)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 10 * float(b.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["base", "ota", "aux"])
@pytest.mark.parametrize(
    ("boxes", "classes", "image_hw"),
    [((7,), 4, (128, 128)), ((0, 5, 30), 4, (128, 192)), ((3, 0, 0, 12, 1), 1, (192, 128)), ((60, 2), 20, (128, 128))],
)
def test_equals_the_plain_reference(
    boxes: tuple[int, ...], classes: int, image_hw: tuple[int, int], kind: str, variant: str
) -> None:
    hyp = HYP | VARIANTS[variant]
    setting = Setting(boxes, classes=classes, image_hw=image_hw, auxiliary=kind == "aux", hyp=hyp, seed=len(boxes))
    loss, gradients, items = expected(setting, kind)
    assert_same(setting.run("anchor" if kind == "base" else "ota"), (loss, gradients))
    _, parts = setting.criterion("anchor" if kind == "base" else "ota")(setting.maps, setting.targets, setting.image_hw)
    torch.testing.assert_close(torch.stack(parts), items, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_plain_reference_on_random_batches(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 9, (), generator=generator))
    boxes = torch.randint(0, 25, (size,), generator=generator).tolist()
    kind = ("ota", "base", "aux")[seed % 3]
    setting = Setting(boxes, seed=seed, auxiliary=kind == "aux", classes=1 + 7 * (seed % 2))
    loss, gradients, _ = expected(setting, kind)
    assert_same(setting.run("anchor" if kind == "base" else "ota"), (loss, gradients))


def test_gains_by_hand() -> None:
    assert scale_gains(LossRecipe(box=0.05, obj=0.7, cls=0.3), 3, 80, 640) == pytest.approx((0.05, 0.7, 0.3))
    assert scale_gains(LossRecipe(box=0.05, obj=0.7, cls=0.3), 4, 20, 1280) == pytest.approx((0.0375, 2.1, 0.05625))


def test_loss_of_a_batch_without_targets_by_hand() -> None:
    setting = Setting((0, 0), classes=3)
    levels = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(2.0)), math.log1p(math.exp(0.0))]
    for raw, logit in zip(setting.maps, (-1.0, 2.0, 0.0), strict=True):
        raw.detach()[..., 4] = logit
    wanted = 0.7 * (128 / 640) ** 2 * sum(b * level for b, level in zip((4.0, 1.0, 0.4), levels, strict=True))
    for assigner in ("ota", "anchor"):
        loss, parts = setting.criterion(assigner)(setting.maps, setting.targets, setting.image_hw)
        assert isinstance(parts, LossParts)
        assert parts.box == 0 and parts.cls == 0 and loss.shape == ()
        assert float(parts.obj) == pytest.approx(wanted, rel=1e-6)
        assert loss.item() == pytest.approx(2 * wanted, rel=1e-6)
        for gradient in torch.autograd.grad(loss, setting.maps):
            assert gradient[..., 4].abs().min() > 0
            assert gradient[..., :4].abs().max() == 0 and gradient[..., 5:].abs().max() == 0


def test_targets_that_fit_no_anchor_count_as_background() -> None:
    setting, empty = Setting((4, 3)), Setting((0, 0))
    setting.targets[:, 4:] = 1e-4
    for assigner in ("ota", "anchor"):
        loss, _ = setting.criterion(assigner)(setting.maps, setting.targets, setting.image_hw)
        background, _ = empty.criterion(assigner)(setting.maps, empty.targets, setting.image_hw)
        assert torch.equal(loss, background)


def test_lead_maps_of_an_auxiliary_model_are_taken_with_anchor_assignment() -> None:
    setting = Setting((5, 9), auxiliary=True)
    lead = setting.maps[:4]
    ours, _ = setting.criterion("ota")(lead, setting.targets, setting.image_hw)
    hyp = setting.hyp | setting.criterion().gains._asdict()
    plain, _ = loss_reference.loss(
        lead, setting.targets, hyp, setting.anchors, setting.stride.tolist(), setting.image_hw, kind="base"
    )
    torch.testing.assert_close(ours, plain, rtol=2e-5, atol=0)


def test_compat_takes_the_height_for_both_axes() -> None:
    setting = Setting((20,), image_hw=(128, 256), seed=3)
    hyp = setting.hyp | setting.criterion().gains._asdict()
    criterion = DetectionLoss(setting.model, setting.hyp, 256, compat=True)  # type: ignore[arg-type]
    loss, _ = criterion(setting.maps, setting.targets, (128, 256))
    stride = setting.stride.tolist()
    plain, _ = loss_reference.loss(
        setting.maps, setting.targets, hyp, setting.anchors, stride, (128, 128), kind="ota", ties="topk"
    )
    ours, _ = setting.criterion()(setting.maps, setting.targets, (128, 256))
    torch.testing.assert_close(loss, plain, rtol=2e-5, atol=0)
    assert abs(ours.item() - plain.item()) > 1e-3 * plain.item()


def test_anchors_are_read_at_every_call() -> None:
    setting = Setting((6, 6))
    criterion = setting.criterion()
    before, _ = criterion(setting.maps, setting.targets, setting.image_hw)
    setting.model.head.anchors.mul_(1.3)
    after, _ = criterion(setting.maps, setting.targets, setting.image_hw)
    fresh, _ = setting.criterion()(setting.maps, setting.targets, setting.image_hw)
    assert torch.equal(after, fresh) and not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["ota", "aux"])
def test_half_precision_maps_are_computed_in_float32(dtype: torch.dtype, kind: str) -> None:
    setting = Setting((10, 3), auxiliary=kind == "aux")
    half = [raw.detach().to(dtype).requires_grad_() for raw in setting.maps]
    setting.maps = [raw.detach().float().requires_grad_() for raw in half]
    loss, gradients = setting.run()
    ours, _ = setting.criterion()(half, setting.targets, setting.image_hw)
    assert ours.dtype == torch.float32 and torch.equal(ours, loss)
    step = torch.finfo(dtype).eps
    for raw, gradient in zip(half, gradients, strict=True):
        (own,) = torch.autograd.grad(ours, raw, retain_graph=True)
        assert own.dtype == dtype
        # a cell with several matches adds several rounded numbers
        torch.testing.assert_close(own.float(), gradient, rtol=4 * step, atol=2 * step * float(gradient.abs().max()))


def test_maps_of_another_memory_format_give_the_same() -> None:
    setting = Setting((10, 3))
    loss, gradients = setting.run()
    setting.maps = [
        raw.detach().permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4).requires_grad_() for raw in setting.maps
    ]
    assert not setting.maps[0].is_contiguous()
    assert_same(setting.run(), (loss, gradients), rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("logit", [200.0, -200.0, 17.5])
@pytest.mark.parametrize("classes", [1, 4])
def test_saturated_logits_stay_finite(logit: float, classes: int, gamma: float) -> None:
    setting = Setting((8, 2), classes=classes, hyp=HYP | {"fl_gamma": gamma})
    for raw in setting.maps:
        raw.detach()[..., 4:] = logit  # sqrt(sigmoid * sigmoid) rounds to exactly 1, or to exactly 0
    loss, gradients = setting.run()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    matches = matches_of(setting)
    assert matches.valid.any(1).all()  # the costs still choose something


def matches_of(setting: Setting) -> assign.Candidates:
    criterion = setting.criterion()
    padded = assign.pad_targets(setting.targets, len(setting.maps[0]), setting.model.head.nc)
    candidates = criterion._candidates(setting.maps, padded, 0.5)
    rows, _ = detection.read_maps(setting.maps, candidates)
    return criterion._choose(rows, candidates, padded, setting.image_hw, 10)


def test_empty_boxes_do_no_harm() -> None:
    setting = Setting((8, 2))
    setting.targets[::3, 4:] = 0.0
    loss, gradients = setting.run()
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", ["base", "ota", "aux"])
def test_without_squeezing_as_on_an_accelerator(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting((10, 0, 25), auxiliary=kind == "aux")
    assigner = "anchor" if kind == "base" else "ota"
    squeezed = setting.run(assigner)
    monkeypatch.setattr(assign, "_squeeze", lambda values, valid: (values, valid))
    monkeypatch.setattr(detection, "kept", lambda valid: slice(None))
    assert_same(setting.run(assigner), squeezed, rtol=1e-5)


@pytest.mark.parametrize("kind", ["base", "ota", "aux"])
def test_nothing_on_the_accelerator_path_waits_for_a_value(kind: str) -> None:
    """The meta device has no values: .item(), nonzero or a boolean index on it raises."""
    setting = Setting((10, 0, 25), auxiliary=kind == "aux", device="meta")
    loss, gradients = setting.run("anchor" if kind == "base" else "ota")
    assert loss.device.type == "meta"
    assert [gradient.shape for gradient in gradients] == [raw.shape for raw in setting.maps]
    with pytest.raises((RuntimeError, NotImplementedError)):
        setting.maps[0].nonzero()


class Recorder(TorchDispatchMode):
    """Counts operators and remembers the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.count += 1
        self.largest = max(self.largest, result.numel() if isinstance(result, Tensor) else 0)
        return result


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", ["base", "ota", "aux"])
def test_number_of_operators_does_not_depend_on_batch_or_boxes(kind: str, device: str) -> None:
    counts = set()
    for batch, boxes in ((2, 5), (2, 50), (8, 5), (8, 50)):
        setting = Setting((boxes,) * batch, auxiliary=kind == "aux", device=device)
        with Recorder() as recorder:
            setting.run("anchor" if kind == "base" else "ota")
        counts.add(recorder.count)
    assert len(counts) == 1, counts


def test_many_boxes_are_treated_in_slices_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting((700, 3), classes=2)
    whole = setting.run()
    with Recorder() as recorder:
        matches_of(setting)
    limit = recorder.largest // 5
    monkeypatch.setattr(assign, "PAIR_LIMIT", limit)
    with Recorder() as recorder:
        matches_of(setting)
    assert recorder.largest <= limit
    sliced = setting.run()
    assert torch.equal(whole[0], sliced[0])
    assert all(torch.equal(a, b) for a, b in zip(whole[1], sliced[1], strict=True))


def test_thousands_of_boxes() -> None:
    setting = Setting((2500,), classes=2)
    with Recorder() as recorder:
        loss, gradients = setting.run()
    assert recorder.largest <= assign.PAIR_LIMIT
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_validation_needs_no_gradient() -> None:
    setting = Setting((5, 9))
    with torch.no_grad():
        loss, _ = setting.criterion()(setting.maps, setting.targets, setting.image_hw)
    assert not loss.requires_grad and float(loss) == float(setting.run()[0])


def test_reading_a_map_has_the_gradient_of_plain_indexing() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 3, 4, 5, 7, generator=generator, requires_grad=True)
    index = [torch.randint(n, (2, 40), generator=generator) for n in (3, 4, 5)]  # 40 of 60 cells: some twice
    rows, objectness = detection._ReadMap.apply(raw, torch.arange(2)[:, None], *index)
    weights = torch.randn(2, 40, 7, generator=generator), torch.randn(120, generator=generator)
    (ours,) = torch.autograd.grad((rows * weights[0]).sum() + (objectness * weights[1]).sum(), raw)
    image = torch.arange(2)[:, None]
    plain = (raw[image, index[0], index[1], index[2]] * weights[0]).sum() + (raw[..., 4].flatten() * weights[1]).sum()
    (theirs,) = torch.autograd.grad(plain, raw)
    assert torch.equal(rows, raw[image, index[0], index[1], index[2]])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_last_match_of_a_cell_sets_its_objectness() -> None:
    quality = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9])
    cell = torch.tensor([2, 0, 2, 0, 3])
    valid = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    assert torch.equal(detection.objectness_target(quality, cell, valid, 4), torch.tensor([0.2, 0.0, 0.3, 0.0]))


def test_what_is_wrong_is_named() -> None:
    setting = Setting((5, 9))
    criterion = setting.criterion()
    with pytest.raises(ValueError, match='"ota" or "anchor", got \'simota\''):
        setting.criterion("simota")
    with pytest.raises(ValueError, match="3 levels, got 2"):
        criterion(setting.maps[:2], setting.targets, setting.image_hw)
    with pytest.raises(ValueError, match="3 levels, got 6"):
        criterion(setting.maps * 2, setting.targets, setting.image_hw)
    wrongs = ((0, 2.0, "batch of 2"), (0, -1.0, "batch of 2"), (1, 4.0, "0..3"), (1, -1.0, "0..3"))
    for column, value, message in wrongs:
        wrong = setting.targets.clone()
        wrong[3, column] = value
        with pytest.raises(ValueError, match=message):
            criterion(setting.maps, wrong, setting.image_hw)
    with pytest.raises(ValueError, match=r"\[n, 6\].*\[14, 5\]"):
        criterion(setting.maps, setting.targets[:, 1:], setting.image_hw)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_processes_with_the_common_count_of_matches_add_up_to_one(auxiliary: bool) -> None:
    """One process has many boxes, the other few: means over their own would weigh the boxes unequally."""
    setting = Setting([9, 1, 0, 2], auxiliary=auxiliary)
    whole, wanted = setting.run()

    def halves(average: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        loss = DetectionLoss(setting.model, setting.hyp, max(setting.image_hw), average=average)  # type: ignore[arg-type]
        total = torch.zeros(())
        for first, last in ((0, 2), (2, 4)):
            image = setting.targets[:, 0]
            targets = setting.targets[(image >= first) & (image < last)] - torch.tensor([first, 0, 0, 0, 0, 0])
            total = total + loss([raw[first:last] for raw in setting.maps], targets, setting.image_hw)[0]
        return total.detach(), list(torch.autograd.grad(total, setting.maps))

    counts: list[Tensor] = []
    separate, _ = halves(lambda count: counts.append(count) or count)  # type: ignore[func-returns-value]
    terms = len(counts) // 2
    means = [(a + b) / 2 for a, b in zip(counts[:terms], counts[terms:], strict=True)] * 2
    common, gradients = halves(lambda count: means.pop(0))
    torch.testing.assert_close(common, whole, rtol=1e-6, atol=0)
    for ours, one in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-5, atol=1e-8)
    assert abs(float(separate / whole) - 1) > 1e-3


def test_class_weights_count_each_object_by_its_class() -> None:
    """The class term is linear in the weights, an object adds to its own class's share; the other terms stay."""
    setting = Setting((9, 6), classes=4, seed=3)

    def terms(weights: list[float] | None, targets: Tensor = setting.targets) -> LossParts:
        criterion = DetectionLoss(setting.model, setting.hyp, 128, "ota", class_weights=weights)  # type: ignore[arg-type]
        return criterion(setting.maps, targets, setting.image_hw)[1]

    plain = terms(None)
    shares = [terms([float(label == other) for other in range(4)]) for label in range(4)]
    torch.testing.assert_close(sum(each.cls for each in shares), plain.cls)
    assert all(torch.equal(each.box, plain.box) and torch.equal(each.obj, plain.obj) for each in shares)
    weights = [0.5, 2.0, 1.0, 3.0]
    torch.testing.assert_close(
        terms(weights).cls, sum(weight * each.cls for weight, each in zip(weights, shares, strict=True))
    )
    only = setting.targets.clone()
    only[:, 1] = 3
    torch.testing.assert_close(terms(weights, only).cls, 3 * terms(None, only).cls)
