"""Properties of the layers, heads and the whole network that do not depend on the oracle numbers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_yolo.models import DetectionModel, build_model, deploy
from sp_yolo.models.blocks import SPPCSPC, Chuncat, Conv, ReOrg, RepConv
from sp_yolo.models.deploy import fuse
from sp_yolo.models.heads import IAuxDetect, IDetect

ANCHORS = [[10.0, 12, 20, 24], [40.0, 44, 60, 66]]


def small(head: str = "IDetect") -> DetectionModel:
    """Two levels, strides 8 and 16, 3 classes, every kind of layer that changes behaviour with the mode."""
    rows = {
        "backbone": [[-1, 1, "ReOrg", []], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "DownC", [32]]],
        "head": [
            [-1, 1, "MP", []],
            [-1, 1, "SPPCSPC", [24]],
            [2, 1, "RepConv", [32, 3, 1]],
            [-2, 1, "Conv", [40, 3, 1]],
            [[5, 6], 1, head, ["nc", "anchors"]],
        ],
    }
    if head == "IAuxDetect":
        rows["head"][-1:] = [
            [5, 1, "Conv", [16, 3, 1]],
            [4, 1, "Conv", [16, 3, 1]],
            [[5, 6, 7, 8], 1, head, ["nc", "anchors"]],
        ]
    torch.manual_seed(3)
    model = build_model({"nc": 3, "anchors": ANCHORS, **rows}).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def image(height: int = 64, width: int = 96, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_decode_against_the_formula_box_by_box() -> None:
    model = small()
    with torch.no_grad():
        decoded, raw = model(image())
    assert decoded.shape == (2, 2 * (8 * 12 + 4 * 6), 8)
    rows = []
    for level, (stride, values) in enumerate(zip((8, 16), raw, strict=True)):
        for anchor in range(2):
            w, h = ANCHORS[level][2 * anchor : 2 * anchor + 2]
            for y in range(values.shape[2]):
                for x in range(values.shape[3]):
                    s = torch.sigmoid(values[1, anchor, y, x])
                    box = [
                        (2 * s[0] - 0.5 + x) * stride,
                        (2 * s[1] - 0.5 + y) * stride,
                        (2 * s[2]) ** 2 * w,
                        (2 * s[3]) ** 2 * h,
                    ]
                    rows.append(torch.cat((torch.stack(box), s[4:])))
    torch.testing.assert_close(decoded[1], torch.stack(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [IDetect, IAuxDetect])
def test_implicit_vectors_are_added_and_multiplied(kind: type[IDetect]) -> None:
    channels = [6, 10] * (2 if kind is IAuxDetect else 1)
    head = kind(3, ANCHORS, channels, [8, 16]).double()
    features = [torch.randn(2, c, 4, 4, dtype=torch.float64) for c in channels]
    maps = head(features)
    assert len(maps) == len(channels)
    for level in range(2):
        output = head.m[level](features[level] + head.ia[level].implicit) * head.im[level].implicit
        expected = output.view(2, 2, 8, 4, 4).permute(0, 1, 3, 4, 2)
        torch.testing.assert_close(maps[level], expected, rtol=1e-12, atol=1e-12)
    if kind is IAuxDetect:
        expected = head.m2[1](features[3]).view(2, 2, 8, 4, 4).permute(0, 1, 3, 4, 2)
        torch.testing.assert_close(maps[3], expected, rtol=1e-12, atol=1e-12)
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_auxiliary_branch_costs_nothing_in_inference() -> None:
    model = small("IAuxDetect")
    ran: list[int] = []
    for index, layer in enumerate(model.model):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        decoded, raw = model(image())
    assert ran == [0, 1, 2, 3, 4, 5, 6, 9] and len(raw) == 2
    ran.clear()
    assert len(model.train()(image())) == 4 and ran == list(range(10))
    assert decoded.shape[1] == 240


def test_deployed_model_keeps_its_source_untouched() -> None:
    for head in ("Detect", "IDetect", "IAuxDetect"):
        model = small(head)
        before = copy.deepcopy(model.state_dict())
        model.names = ["a", "b", "c"]
        random_state = torch.get_rng_state()
        deployed = deploy(model.train())
        assert torch.equal(random_state, torch.get_rng_state())
        assert model.training and not deployed.training and deployed.names == ["a", "b", "c"]
        assert not any(p.requires_grad for p in deployed.parameters())
        with torch.no_grad():
            torch.testing.assert_close(deployed(image())[0], model.eval()(image())[0], rtol=1e-10, atol=1e-10)
            twice = deploy(deployed)
            torch.testing.assert_close(twice(image())[0], model(image())[0], rtol=1e-10, atol=1e-10)
        for value in deployed.state_dict().values():
            value.zero_()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("groups", [1, 4])
def test_repconv_with_identity_branch_fuses_exactly(groups: int) -> None:
    torch.manual_seed(0)
    block = RepConv(8, 8, 3, 1, None, groups).double()
    assert block.rbr_identity is not None
    for norm in (block.rbr_identity, block.rbr_dense[1], block.rbr_1x1[1]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    block.eval()
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    expected = block(x)
    fuse(block)
    assert list(block.state_dict()) == ["rbr_reparam.weight", "rbr_reparam.bias"]
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_conv_fuses_with_groups_and_stride() -> None:
    block = Conv(8, 12, 3, 2, None, 4, nn.Hardswish()).double().eval()
    nn.init.uniform_(block.bn.running_var, 0.5, 2)
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    expected = block(x)
    fuse(block)
    assert list(block.state_dict()) == ["conv.weight", "conv.bias"]
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_chained_pools_are_the_large_pools() -> None:
    block = SPPCSPC(6, 4, k := False, kernels=(5, 9, 13)).double().eval()
    assert k is False
    x = torch.randn(2, 6, 20, 17, dtype=torch.float64)
    inner = block.cv4(block.cv3(block.cv1(x)))
    pools = [F.max_pool2d(inner, kernel, 1, kernel // 2) for kernel in (5, 9, 13)]
    expected = block.cv7(torch.cat((block.cv6(block.cv5(torch.cat([inner, *pools], 1))), block.cv2(x)), 1))
    assert torch.equal(block(x), expected)


def test_phases_and_halves_are_in_the_originals_order() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert ReOrg()(x)[0, :, 0, 0].tolist() == [0.0, 4.0, 1.0, 5.0]
    a, b = torch.arange(4.0).view(1, 4, 1, 1), torch.arange(10.0, 12).view(1, 2, 1, 1)
    assert Chuncat()([a, b]).flatten().tolist() == [0.0, 1.0, 10.0, 2.0, 3.0, 11.0]


def test_augmented_boxes_are_those_of_three_passes() -> None:
    model = small()
    x = image(64, 96)
    with torch.no_grad():
        boxes, raw = model(x, augment=True)
        assert raw is None
        parts = [model(x)[0]]
        for scale, mirrored in ((0.83, True), (0.67, False)):
            scaled = F.interpolate(x.flip(3) if mirrored else x, (int(64 * scale), int(96 * scale)), mode="bilinear")
            # 64 * 0.83 = 53.1 -> 64, 96 * 0.83 = 79.7 -> 80; 64 * 0.67 = 42.9 -> 48, 96 * 0.67 = 64.3 -> 80
            canvas = torch.full((2, 3, 64 if mirrored else 48, 80), 0.447, dtype=torch.float64)
            canvas[:, :, : scaled.shape[2], : scaled.shape[3]] = scaled
            part = model(canvas)[0].clone()
            part[..., :4] /= scale
            if mirrored:
                part[..., 0] = 96 - part[..., 0]
            parts.append(part)
    torch.testing.assert_close(boxes, torch.cat(parts, 1), rtol=1e-12, atol=1e-12)


def test_memory_format_changes_nothing_and_maps_are_not_copied() -> None:
    model = small("IAuxDetect").train()
    expected = model(image())
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    maps = other(image().contiguous(memory_format=torch.channels_last))
    for a, b in zip(maps, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert a.stride(-1) == 1, "channels_last maps have their outputs side by side without a copy"
    assert other.model[1].conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_decodes_in_float32() -> None:
    model = small().float()
    x = image(64, 96).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoded, raw = model(x)
    assert raw[0].dtype == torch.bfloat16 and decoded.dtype == torch.float32
    with torch.no_grad():
        exact, _ = model(x)
        again = model.head.decode(raw)
    torch.testing.assert_close(decoded, again, rtol=0, atol=0)
    # 8 bits of mantissa in the maps; a centre computed in bfloat16 would be off by up to 0.25 px at 64 px already.
    assert float((decoded[..., :2] - exact[..., :2]).abs().max()) < 1.0


def test_outputs_do_not_depend_on_the_batch() -> None:
    model = small("IAuxDetect")
    with torch.no_grad():
        together = model(image())[0]
        alone = [model(image()[i : i + 1])[0] for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_traced_model_follows_the_batch_size() -> None:
    model = deploy(small("IAuxDetect"))
    traced = torch.jit.trace(model, image(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(traced(image(batch=3))[0], model(image(batch=3))[0])


def test_compiled_graph_is_whole() -> None:
    """torch.compile needs no graph break, in training and in inference (the back end here is the tracer itself)."""
    model = small("IAuxDetect")
    for training in (True, False):
        model.train(training)
        expected, compiled = model(image()), torch.compile(model, backend="eager", fullgraph=True)(image())
        if not training:
            expected, compiled = [expected[0]], [compiled[0]]
        for a, b in zip(compiled, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_reach_every_weight_in_training() -> None:
    model = small("IAuxDetect").train()
    sum(m.square().mean() for m in model(image())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
