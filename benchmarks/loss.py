"""Loss and assignment against a plain per-image implementation of the same formulas.

    python benchmarks/loss.py [--rounds 15] [--threads 2]

Batch 16 with 20 boxes per image, OTA, nc = 80, float32, CPU: maps of yolov7-tiny at 320 px and of yolov7 at 640 px. The
plain implementation is tests/support/loss_reference.py. Both run in interleaved rounds on the same inputs; printed are
median milliseconds, the median of the rounds' ratios and its quartiles, and the number of ATen operators of one call.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import loss_reference

from sp_yolo.losses import DetectionLoss
from sp_yolo.losses.assign import pad_targets
from sp_yolo.losses.detection import read_maps

STRIDES = (8, 16, 32)
ANCHORS = {
    "yolov7-tiny": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]],
    "yolov7": [[12, 16, 19, 36, 40, 28], [36, 75, 76, 55, 72, 146], [142, 110, 192, 243, 459, 401]],
}
HYP = {"box": 0.05, "obj": 0.7, "cls": 0.3, "cls_pw": 1.0, "obj_pw": 1.0, "anchor_t": 4.0, "fl_gamma": 0.0}


class Setting:
    """Random maps and targets of one network at one size."""

    def __init__(self, name: str, size: int, batch: int, boxes: int, classes: int = 80) -> None:
        generator = torch.Generator().manual_seed(0)
        self.size, self.batch = size, batch
        stride = torch.tensor(STRIDES, dtype=torch.float32)
        self.anchors = torch.tensor(ANCHORS[name], dtype=torch.float32).view(3, 3, 2) / stride.view(3, 1, 1)
        head = SimpleNamespace(anchors=self.anchors, nl=3, na=3, nc=classes, auxiliary=False)
        self.loss = DetectionLoss(SimpleNamespace(head=head, stride=stride), HYP, size)  # type: ignore[arg-type]
        self.maps = []
        for s in STRIDES:
            shape = (batch, 3, size // s, size // s, 5 + classes)
            raw = torch.randn(shape, generator=generator)
            raw[..., 4:] -= 4.0  # a detector's logits: most cells say no
            self.maps.append(raw.requires_grad_())
        wh = torch.exp(torch.rand(batch * boxes, 2, generator=generator) * 3 - 3.7)  # 2.5 % to 50 % of the image
        xy = wh / 2 + torch.rand(batch * boxes, 2, generator=generator) * (1 - wh)
        image = torch.arange(batch).repeat_interleave(boxes)[:, None].float()
        cls = torch.randint(classes, (batch * boxes, 1), generator=generator).float()
        self.targets = torch.cat((image, cls, xy, wh), 1)

    def ours_assignment(self) -> None:
        with torch.no_grad():
            padded = pad_targets(self.targets, self.batch, self.loss.head.nc)
            candidates = self.loss._candidates(self.maps, padded, 0.5)
            rows, _ = read_maps(self.maps, candidates)
            self.loss._choose(rows, candidates, padded, (self.size, self.size), 10)

    def plain_assignment(self) -> None:
        with torch.no_grad():
            grids = [(raw.shape[2], raw.shape[3]) for raw in self.maps]
            levels = zip(grids, self.anchors, strict=True)
            found = [loss_reference.candidates(grid, self.targets, anchors, 4.0) for grid, anchors in levels]
            scale = (float(self.size), float(self.size))
            loss_reference.ota(self.maps, found, self.targets, STRIDES, scale, 10, "topk")

    def ours_forward(self) -> torch.Tensor:
        return self.loss(self.maps, self.targets, (self.size, self.size))[0]

    def plain_forward(self, ties: str = "topk") -> torch.Tensor:
        hyp = HYP | self.loss.gains._asdict()
        hw = (self.size, self.size)
        return loss_reference.loss(self.maps, self.targets, hyp, self.anchors, STRIDES, hw, kind="ota", ties=ties)[0]

    def with_backward(self, forward: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(forward(), self.maps)


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def compare(label: str, ours: Callable[[], object], plain: Callable[[], object], rounds: int) -> None:
    ours(), plain()
    pairs = [(milliseconds(ours), milliseconds(plain)) for _ in range(rounds)]
    low, middle, high = statistics.quantiles([plain_ms / ours_ms for ours_ms, plain_ms in pairs], n=4)
    ours_ms, plain_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"| {label} | {ours_ms:.1f} | {plain_ms:.1f} | {middle:.1f} | {low:.1f} to {high:.1f} |", flush=True)


class Operators(TorchDispatchMode):
    """Counts the ATen operators that reach a backend: the kernels of an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(call: Callable[[], object]) -> int:
    with Operators() as counter:
        call()
    return counter.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} interleaved rounds\n")
    print("| | sp-yolo ms | per image ms | ratio | quartiles |\n|---|---|---|---|---|")
    for name, size in (("yolov7-tiny", 320), ("yolov7", 640)):
        s = Setting(name, size, batch=16, boxes=20)
        torch.testing.assert_close(s.ours_forward(), s.plain_forward(ties="first"), rtol=1e-5, atol=0)
        compare(f"{name} {size}: assignment", s.ours_assignment, s.plain_assignment, arguments.rounds)
        compare(f"{name} {size}: loss", s.ours_forward, s.plain_forward, arguments.rounds)
        ours, plain = (lambda s=s: s.with_backward(s.ours_forward)), (lambda s=s: s.with_backward(s.plain_forward))
        compare(f"{name} {size}: loss and gradients", ours, plain, arguments.rounds)
    print("\n| batch | boxes per image | ATen operators of the loss: sp-yolo | per image |\n|---|---|---|---|")
    for batch, boxes in ((2, 5), (2, 50), (8, 5), (8, 50)):
        s = Setting("yolov7-tiny", 320, batch, boxes)
        print(f"| {batch} | {boxes} | {operators(s.ours_forward)} | {operators(s.plain_forward)} |")


if __name__ == "__main__":
    main()
