"""The same iteration on a real GPU: no host wait, kernels counted, losses and gradients those of the CPU."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from training_rig import PRECISIONS, Rig, make_batch, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SIZES = {"yolov7-tiny": 256, "yolov7": 256, "yolov7-w6": 256}
SCALER_WAITS = 1  # see test_pretended.py
TRITON_LAUNCHES = 12


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield


def kernels(work: Callable[[], object]) -> Counter[str]:
    """Kernels that ``work`` launches, by name; copies and fills of memory are among them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return Counter(event.name for event in profile.events() if event.device_type == on_device)


def pinned(size: int, images: int = 4):
    batch = make_batch(size, images)
    return batch._replace(images=batch.images.pin_memory())


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("name", list(SIZES))
def test_an_iteration_waits_for_nothing(name: str, precision: str) -> None:
    rig, batch = Rig(make_model(name), SIZES[name], GPU, precision), pinned(SIZES[name])
    for _ in range(3):
        rig.step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rig.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= (SCALER_WAITS if precision == "fp16" else 0), waits
    rig.step.watch.drain()


@pytest.mark.parametrize("name", list(SIZES))
def test_kernels_of_an_iteration(name: str, record_property: Callable[[str, object], None]) -> None:
    rig, batch = Rig(make_model(name), SIZES[name], GPU, "bf16"), pinned(SIZES[name])
    for _ in range(3):
        rig.step(batch)
    counts = {"iteration": kernels(lambda: rig.step(batch))}
    images = batch.images.to(GPU).float() / 255
    with rig.compute.autocast():
        maps = [raw.detach().requires_grad_() for raw in rig.model(images)]
    hw = (SIZES[name], SIZES[name])
    counts["loss and its backward"] = kernels(lambda: rig.loss(maps, batch.targets, hw)[0].backward())
    for param in rig.model.parameters():
        param.grad = torch.ones_like(param)
    rig.optimizer.step()
    counts["optimizer"] = kernels(rig.optimizer.step)
    path = getattr(rig.optimizer, "path", "")
    counts["ema"] = kernels(lambda: rig.ema.update(rig.model))
    for what, found in counts.items():
        record_property(what, sum(found.values()))
        print(f"{name} (SP: {path}) {what}: {sum(found.values())} kernels; {found.most_common(4)}")
    assert path != "triton" or sum(counts["optimizer"].values()) <= TRITON_LAUNCHES
    assert 0 < sum(counts["ema"].values()) <= 24  # two operations, a launch for every 64 tensors


@pytest.mark.parametrize("name", list(SIZES))
def test_losses_and_gradients_are_the_cpus(name: str) -> None:
    """On one CPU, weights changed by 1e-7 of themselves change these gradients by 1 to 2 % (small BatchNorms)."""
    batch, size, found = make_batch(SIZES[name], 4), SIZES[name], []
    for device in (CPU, GPU):
        rig = Rig(make_model(name), size, device, "fp32")
        images = batch.images.to(device).float() / 255
        loss, parts = rig.loss(
            rig.model(images.contiguous(memory_format=torch.channels_last)), batch.targets, (size, size)
        )
        loss.backward()
        gradient = torch.cat([p.grad.flatten().double().cpu() for p in rig.model.parameters() if p.grad is not None])
        found.append((torch.stack([part.cpu() for part in parts]), gradient))
    (losses, gradient), (gpu_losses, gpu_gradient) = found
    assert torch.allclose(gpu_losses, losses, rtol=1e-3)
    error = (gpu_gradient - gradient).norm() / gradient.norm()
    print(f"{name}: losses {losses.tolist()} and {gpu_losses.tolist()}, gradients differ by {error:.1e}")
    assert error < 0.1


def test_detections_are_the_cpus() -> None:
    batch = make_batch(256, 4)
    cpu, gpu = (Rig(make_model("yolov7-tiny"), 256, device, "fp32") for device in (CPU, GPU))
    for one, other in zip(cpu.detect(batch), gpu.detect(batch), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other.cpu(), atol=1e-2)
