"""Time of one optimizer step as a ratio to AdamW(fused=True) in the same interleaved run.

    python benchmarks/optimizer_step.py [--models yolov7-tiny resnet50 yolov7] [--rounds 7] [--threads 1]

One unit is ten steps, so that SP's proximal step (every ten steps, ranking all prunable weights) is in it once. The
parameters are those of the named network, in the order and shapes it has; the gradients are random and fixed. Each
round times every optimizer once, in turn; the table gives the median of the rounds' ratios and their range. One thread
is timed in CPU seconds, which other programs on the machine disturb less; several threads in wall seconds.

    python benchmarks/optimizer_step.py --device cuda [--models ...] [--rounds 9]

The same on a GPU, with its variants, between CUDA events. "host": until a step was issued. "GPU": the kernels' and
copies' own time, and "launches" their number, from the profiler.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sp_yolo.optim import SP, build_param_groups

STEPS = 10
# In the middle of the sparsity ramp: sigma_k grows between proximal steps.
RAMP: dict[str, Any] = {"every": STEPS, "start": 0.0, "end": 1.0, "total_steps": 4000}
RAMP_STEP = 1000


def network(name: str) -> nn.Module:
    if name == "resnet50":
        from torchvision.models import resnet50

        return resnet50()
    from sp_yolo.models import build_model

    return build_model(name)


def pruning(model: nn.Module, **settings: Any) -> SP:
    groups = build_param_groups(model, sigma_backbone=0.8, sigma_head=0.8, **RAMP)
    return SP(groups, lr=1e-4, **settings)


VARIANTS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True),
    "AdamW for-loop": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, foreach=False),
    "SGD Nesterov for-loop": lambda m: torch.optim.SGD(
        m.parameters(), lr=1e-4, momentum=0.9, nesterov=True, foreach=False
    ),
    "SP, C": lambda m: SP(build_param_groups(m), lr=1e-4, native=True),
    "SP, C, gradients looked at": lambda m: SP(build_param_groups(m), lr=1e-4, native=True, check_finite=False),
    "SP, C, pruning": lambda m: pruning(m, native=True),
    "SP without a metric, C": lambda m: SP(build_param_groups(m), lr=1e-4, metric="none", native=True),
    "SP without a metric, C, pruning": lambda m: pruning(m, metric="none", native=True),
    "SP, torch": lambda m: SP(build_param_groups(m), lr=1e-4, native=False),
    "SP, torch, pruning": lambda m: pruning(m, native=False),
    "SP without a metric, torch": lambda m: SP(build_param_groups(m), lr=1e-4, metric="none", native=False),
    "SP, foreach": lambda m: SP(build_param_groups(m), lr=1e-4, foreach=True),
}

CUDA_VARIANTS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, foreach=True),
    "SGD Nesterov fused": lambda m: torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9, nesterov=True, fused=True),
    "SP, Triton": lambda m: SP(build_param_groups(m), lr=1e-4),
    "SP, Triton, gradients looked at": lambda m: SP(build_param_groups(m), lr=1e-4, check_finite=False),
    "SP, Triton, pruning": lambda m: pruning(m),
    "SP without a metric, Triton": lambda m: SP(build_param_groups(m), lr=1e-4, metric="none"),
    "SP, foreach": lambda m: SP(build_param_groups(m), lr=1e-4, foreach=True),
    "SP, foreach, gradients looked at": lambda m: SP(build_param_groups(m), lr=1e-4, foreach=True, check_finite=False),
}


def prepared(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The optimizer with its state built and its code compiled, in the middle of the sparsity ramp."""
    torch.manual_seed(0)
    for param in model.parameters():
        param.grad = torch.randn_like(param) * 1e-3
    optimizer = make(model)
    for _ in range(2):
        optimizer.step()
    if isinstance(optimizer, SP):
        optimizer.param_groups[0]["k"] = RAMP_STEP
        for _ in range(STEPS):
            optimizer.step()
    return optimizer


def unit_seconds(optimizer: torch.optim.Optimizer) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(STEPS):
        optimizer.step()
    return (clock() - begin) / STEPS


def measure(name: str, variants: list[str], rounds: int) -> None:
    optimizers = {variant: prepared(network(name), VARIANTS[variant]) for variant in variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, optimizer in optimizers.items():
            seconds[variant].append(unit_seconds(optimizer))
    size = sum(p.numel() for group in optimizers[variants[0]].param_groups for p in group["params"])
    print(f"\n{name}, {size / 1e6:.1f} M parameters, {rounds} rounds of {STEPS} steps")
    print("| optimizer | ms per step, median | ratio to AdamW fused, median (range) |\n|---|---|---|")
    for variant, times in seconds.items():
        ratios = [t / base for t, base in zip(times, seconds["AdamW fused"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {variant} | {statistics.median(times) * 1e3:.1f} | {spread} |", flush=True)


def unit_milliseconds(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Of a step: between CUDA events, and until the host had issued it."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    since = time.perf_counter()
    begin.record()
    for _ in range(STEPS):
        optimizer.step()
    end.record()
    host = time.perf_counter() - since
    end.synchronize()
    return begin.elapsed_time(end) / STEPS, host * 1e3 / STEPS


def launches(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Kernels and copies per step, and their milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            optimizer.step()
        torch.cuda.synchronize()
    events = [
        e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Optimizer" not in e.name
    ]
    return len(events) / STEPS, sum(e.time_range.elapsed_us() for e in events) / 1e3 / STEPS


def measure_cuda(name: str, variants: list[str], rounds: int) -> None:
    model = network(name)
    optimizers = {v: prepared(copy.deepcopy(model).cuda(), CUDA_VARIANTS[v]) for v in variants}
    rows: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    for k in range(rounds + 1):
        for variant, optimizer in optimizers.items():
            timed = unit_milliseconds(optimizer)
            if k:  # the first round warms up
                rows[variant].append(timed)
    tensors = [p for p in model.parameters()]
    size = sum(p.numel() for p in tensors) / 1e6
    print(f"\n{name}, {size:.1f} M parameters in {len(tensors)} tensors, {rounds} rounds of {STEPS} steps")
    print("| optimizer | path | ms per step, median (range) | to AdamW fused | host ms | GPU ms | launches |")
    print("|---|---|---|---|---|---|---|")
    for variant, timed in rows.items():
        device, host = (list(column) for column in zip(*timed, strict=True))
        ratio = statistics.median(d / b for d, (b, _) in zip(device, rows["AdamW fused"], strict=True))
        number, busy = launches(optimizers[variant])
        path = getattr(optimizers[variant], "path", "")
        middle = f"{statistics.median(device):.3f} ({min(device):.3f}-{max(device):.3f})"
        cells = (variant, path, middle, f"{ratio:.2f}", f"{statistics.median(host):.3f}", f"{busy:.3f}", f"{number:g}")
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yolov7-tiny", "resnet50", "yolov7"])
    parser.add_argument("--variants", nargs="+", choices=list({**VARIANTS, **CUDA_VARIANTS}))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    known = CUDA_VARIANTS if arguments.device == "cuda" else VARIANTS
    variants = list(dict.fromkeys(["AdamW fused", *(v for v in arguments.variants or known if v in known)]))
    if arguments.device == "cuda":
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
        for name in arguments.models:
            try:
                measure_cuda(name, variants, arguments.rounds)
            except ModuleNotFoundError as error:
                print(f"\n{name} needs {error.name}")
        return
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {arguments.threads} thread(s)")
    for name in arguments.models:
        measure(name, variants, arguments.rounds)


if __name__ == "__main__":
    main()
