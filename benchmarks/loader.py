"""CPU time of the data pipeline per training image: in this process, by stage, and through worker processes.

python benchmarks/loader.py                                   # the toy set, 320 px
python benchmarks/loader.py --data data/bccd.yaml --size 640 --workers 0 1 2 --cache ram
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sp_yolo.config import AugmentRecipe, load_dataset_config
from sp_yolo.data import DetectionDataset, build_loader, ensure_toy_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="dataset YAML; default: the toy set, made in a temporary folder")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cache", choices=("off", "ram", "disk"), default="off")
    parser.add_argument("--images", type=int, default=800, help="images per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="hyperparameters, e.g. mixup=0.15")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        yaml = options.data or ensure_toy_dataset(Path(folder) / "toy")
        config = load_dataset_config(yaml)
        augment = AugmentRecipe.of({key: float(value) for key, value in (item.split("=") for item in options.set)})
        cache = {"off": False, "ram": True, "disk": "disk"}[options.cache]
        started = time.perf_counter()
        dataset = DetectionDataset(config, "train", options.size, augment=augment, cache_images=cache)
        print(f"{len(dataset)} images scanned in {time.perf_counter() - started:.2f} s {dataset.cache_note}")
        if options.profile:
            print_profile(dataset, options.images)
            return
        print("workers  CPU ms/image  wall ms/image  (median of rounds, spread)   peak RSS MiB")
        for workers in options.workers:
            measure(dataset, workers, options)


def measure(dataset: DetectionDataset, workers: int, options: argparse.Namespace) -> None:
    """One line: CPU of this process and its workers, and wall time with nothing else to do."""
    loader = build_loader(dataset, batch_size=options.batch, shuffle=True, seed=0, workers=workers)
    cpu, wall = [], []
    for epoch in range(options.rounds + 1):  # the first round starts workers and warms caches
        before, started, shown = cpu_seconds(), time.perf_counter(), 0
        while shown < options.images:
            for batch in loader.epoch(epoch):
                shown += len(batch.metas)
        if epoch:
            cpu.append(1e3 * (cpu_seconds() - before) / shown)
            wall.append(1e3 * (time.perf_counter() - started) / shown)
    spread = f"{min(wall):.2f}..{max(wall):.2f}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{workers:7d} {statistics.median(cpu):13.2f} {statistics.median(wall):14.2f}  ({spread})  {peak:10d}")


def cpu_seconds() -> float:
    """User and system seconds of this process and of its living children (read from /proc where there is one)."""
    times = os.times()
    total = times.user + times.system
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    for child in children.read_text().split() if children.exists() else ():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def print_profile(dataset: DetectionDataset, count: int) -> None:
    profile = cProfile.Profile()
    profile.enable()
    for index in range(count):
        dataset.item(index % len(dataset), index // len(dataset))
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
