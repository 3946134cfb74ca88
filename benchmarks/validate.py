"""Speed of validation, and where its time goes: loading, network, NMS, metric.

python benchmarks/validate.py --weights runs/train/exp/weights/best.pt --data data/toy.yaml --img 320 --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sp_yolo.boxes import non_max_suppression
from sp_yolo.engine.splits import open_dataset, open_measured_split
from sp_yolo.engine.validate import CONF_THRES, IOU_THRES, validate
from sp_yolo.eval import coco_evaluate
from sp_yolo.models import deploy, model_from_weights
from sp_yolo.runtime.device import select_compute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a trained model: an untrained one has no detections to sort")
    parser.add_argument("--data", default="data/toy.yaml")
    parser.add_argument("--split", default="val")
    parser.add_argument("--img", type=int, default=320)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deploy", action="store_true", help="fuse and reparameterise the model first")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    compute = select_compute("cpu", "off")
    model = model_from_weights(options.weights).eval()
    model = deploy(model) if options.deploy else model
    dataset = open_dataset(options.data)
    split = open_measured_split(
        dataset,
        options.split,
        image_size=options.img,
        batch_size=options.batch,
        stride=32,
        single_class=False,
        workers=0,
        device=compute.device,
    )
    shares: list[dict[str, float]] = []
    for round_number in range(options.rounds + 1):
        split.evaluator.reset()
        started = time.perf_counter()
        outcome = validate(model, split.loader.epoch(0), split.evaluator, compute)
        validated = time.perf_counter()
        result = split.evaluator.compute()
        metric = time.perf_counter() - validated
        rest = validated - started - sum(outcome.seconds.values())
        if round_number:  # the first one warms up
            shares.append({"loading": rest, **outcome.seconds, "metric": metric})
    count = len(split.data)
    found = split.evaluator.detections()
    print(f"{options.weights}: mAP@.5:.95 {result.map50_95:.3f}, {len(found) / count:.0f} detections per image")
    setting = f"{options.img} px, batch {options.batch}, {options.threads} threads"
    print(f"{count} images at {setting}, torch {torch.__version__}")
    totals = [sum(share.values()) for share in shares]
    rates = [count / total for total in totals]
    print(f"{statistics.median(rates):.1f} images/s (median of {len(rates)}, {min(rates):.1f} to {max(rates):.1f})")
    print(f"peak memory of this process {compute.peak_memory() / 2**20:.0f} MiB")
    print(f"{'stage':>10}{'ms/image':>12}{'share':>9}")
    for stage in shares[0]:
        seconds = statistics.median(share[stage] for share in shares)
        print(f"{stage:>10}{1000 * seconds / count:12.2f}{seconds / statistics.median(totals):9.1%}")
    compare_backends(split.truth, found)
    dense_nms()


def compare_backends(truth: dict, found: list[dict]) -> None:
    """The metric alone, by each backend that is installed."""
    for backend in ("pycocotools", "faster"):
        started = time.perf_counter()
        result = coco_evaluate(truth, found, backend=backend)
        seconds = time.perf_counter() - started
        print(f"metric of {len(found)} detections by {backend}: {seconds:.2f} s (mAP@.5:.95 {result.map50_95:.6f})")


def dense_nms() -> None:
    """NMS alone on the worst kind of input: every row of a 640 px prediction is a candidate of several classes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(1, 25200, 85, generator=generator)
    rows[..., :2] *= 640
    rows[..., 2:4] = 20 + 100 * rows[..., 2:4]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        non_max_suppression(rows, CONF_THRES, IOU_THRES)
        seconds.append(time.perf_counter() - started)
    print(f"NMS of 25200 random rows of 80 classes (2 million candidates): {1000 * statistics.median(seconds):.0f} ms")


if __name__ == "__main__":
    main()
