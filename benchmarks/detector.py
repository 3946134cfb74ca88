"""Images per second of a Detector in batches and one by one, interleaved: what `predict --batch-size` gains.

    python benchmarks/detector.py --cfg yolov7-tiny --img 320 --rounds 5

CPU time of the process is printed beside the wall clock: on a busy machine it alone can be compared.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from sp_yolo import Detector
from sp_yolo.models import build_model, description


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default="yolov7-tiny")
    parser.add_argument("--img", type=int, default=320)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(options.cfg, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "best.pt"
        torch.save({**description(model), "model": model.state_dict()}, path)
        detector = Detector(path, image_size=options.img)
    shape = (options.img * 3 // 4, options.img, 3)
    images = [np.random.default_rng(n).integers(0, 255, shape, dtype=np.uint8) for n in range(options.images)]
    detector(images[:2])
    wall: dict[int, list[float]] = {size: [] for size in options.sizes}
    used: dict[int, list[float]] = {size: [] for size in options.sizes}
    for _ in range(options.rounds):
        for size in options.sizes:
            detector.batch_size = size
            started, before = time.perf_counter(), time.process_time()
            detector(images)
            used[size].append((time.process_time() - before) / len(images))
            wall[size].append((time.perf_counter() - started) / len(images))
    print(f"{options.cfg}, {options.img} px, {torch.get_num_threads()} threads, median of {options.rounds} rounds")
    first = options.sizes[0]
    for size in options.sizes:
        rate, gain = 1 / median(wall[size]), median(wall[first]) / median(wall[size])
        cpu, less = 1000 * median(used[size]), median(used[first]) / median(used[size])
        print(f"batch {size:3d}: {rate:6.1f} images/s ({gain:.2f}), {cpu:6.1f} ms of CPU per image ({less:.2f})")


if __name__ == "__main__":
    main()
