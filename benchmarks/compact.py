"""Speed of compact detectors beside the dense one: onnxruntime on the CPU, one thread, batch 1, taking turns.

python benchmarks/compact.py --models yolov7-tiny runs/train/exp/weights/best-compact.pt --img 224 640 --csv speed.csv

Each file is exported to ONNX (raw maps, checked against the model) in a temporary folder. A round runs every file once;
the ratio is that of a round's times, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sp_yolo.export import export_model
from sp_yolo.models import DetectionModel, build_model, channel_groups, model_from_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="weights, or names and YAML files; the dense first")
    parser.add_argument("--img", type=int, nargs="+", default=[640])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", type=Path, help="write the time of each round and network")
    options = parser.parse_args()
    rows = [("image_size", "model", "round", "ms")]
    print(f"onnxruntime {onnxruntime.__version__}, CPU, one thread, batch 1, {options.rounds} rounds; median (range)")
    for side in options.img:
        print(f"\n| {side} px | GFLOPs | ms | times as fast |\n|---|---|---|---|")
        models = [load(path) for path in options.models]
        with tempfile.TemporaryDirectory() as folder:
            sessions = [session(model, Path(folder) / f"{i}.onnx", side) for i, model in enumerate(models)]
            seconds = measure(sessions, side, options.rounds)
        for path, model, own in zip(options.models, models, seconds, strict=True):
            ratios = [dense / one for dense, one in zip(seconds[0], own, strict=True)]
            flops = channel_groups(model).gflops(side)
            rows += [(str(side), Path(path).stem, str(i), f"{1000 * one:.3f}") for i, one in enumerate(own)]
            print(f"| {path} | {flops:.2f} | {spread([1000 * one for one in own])} | {spread(ratios)} |")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def load(path: str) -> DetectionModel:
    """Weights, or a model of these widths with fresh ones: the time does not depend on them."""
    return model_from_weights(path) if path.endswith(".pt") else build_model(path, 3)


def session(model: DetectionModel, path: Path, side: int) -> onnxruntime.InferenceSession:
    export_model(model, output=path, image_size=(side, side))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def measure(sessions: list[onnxruntime.InferenceSession], side: int, rounds: int) -> list[list[float]]:
    """Seconds of each session and round, after one round that warms up."""
    images = np.random.default_rng(0).random((1, 3, side, side), dtype=np.float32)
    seconds: list[list[float]] = [[] for _ in sessions]
    for round_number in range(rounds + 1):
        for own, one in zip(seconds, sessions, strict=True):
            started = time.perf_counter()
            one.run(None, {"images": images})
            if round_number:
                own.append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
