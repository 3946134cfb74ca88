"""CPU time of the data pipeline per training image: in this process, by stage, and through worker processes.

python benchmarks/loader.py                                   # the toy set, 320 px
python benchmarks/loader.py --data data/bccd.yaml --size 640 --workers 0 1 2 --cache ram
python benchmarks/loader.py --data data/bccd.yaml --size 640 --photos 1920x1080 --turns off ram --against CHECKOUT

``--augment-on device`` counts what is left for the CPU when a GPU warps and colours: without a GPU its work is left
out. ``--photos``: the data's pictures as JPEGs of this size. ``--turns``: instead of one measurement, the caches that
are named, with both places to augment on and, with ``--against``, another checkout's pipeline, in turns, each time in
a process of its own: on a busy machine what is compared is slowed alike.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ.get("MEASURED_CHECKOUT", str(Path(__file__).resolve().parent.parent)))

import cv2
import torch

import sp_yolo.data.loader
from sp_yolo.config import AugmentRecipe, DatasetConfig, load_dataset_config
from sp_yolo.data import DetectionDataset, build_loader, ensure_toy_dataset
from sp_yolo.runtime.device import keep_freed_memory

LINE = "{:7d} {:13.2f} {:14.2f}  ({:.2f}..{:.2f})  {:10d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="dataset YAML; default: the toy set, made in a temporary folder")
    parser.add_argument("--photos", default="", metavar="WxH", help="enlarge its pictures to JPEGs of this size")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cache", choices=("off", "ram", "disk"), default="off")
    parser.add_argument("--augment-on", choices=("cpu", "device"), default="cpu")
    parser.add_argument("--turns", nargs="+", choices=("off", "ram", "disk"), help="caches to compare in turns")
    parser.add_argument("--against", default="", metavar="CHECKOUT", help="another checkout, for --turns")
    parser.add_argument("--images", type=int, default=800, help="images per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="hyperparameters, e.g. mixup=0.15")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    keep_freed_memory()  # as training does

    with tempfile.TemporaryDirectory() as folder:
        config = load_dataset_config(options.data or ensure_toy_dataset(Path(folder) / "toy"))
        if options.photos:
            config = make_photos(config, Path(folder) / "photos", options.photos)
        if options.turns:
            take_turns(config, options)
            return
        measure_all(config, options)


def measure_all(config: DatasetConfig, options: argparse.Namespace) -> None:
    augment = AugmentRecipe.of({key: float(value) for key, value in (item.split("=") for item in options.set)})
    cache = {"off": False, "ram": True, "disk": "disk"}[options.cache]
    where = {"sketches": True} if options.augment_on == "device" else {}
    started = time.perf_counter()
    dataset = DetectionDataset(config, "train", options.size, augment=augment, cache_images=cache, **where)
    print(f"{len(dataset)} images scanned in {time.perf_counter() - started:.2f} s {dataset.cache_note}")
    if options.profile:
        print_profile(dataset, options.images)
        return
    if where and torch.cuda.is_available():
        print_composing(dataset, options.batch)
    print("workers  CPU ms/image  wall ms/image  (median of rounds, spread)   peak RSS MiB")
    for workers in options.workers:
        measure(dataset, workers, options)


def measure(dataset: DetectionDataset, workers: int, options: argparse.Namespace) -> None:
    """One line: CPU of this process and its workers, and wall time with nothing else to do."""
    extra: dict[str, Any] = {}
    if options.augment_on == "device":
        if torch.cuda.is_available():
            extra = {"device": torch.device("cuda"), "pin_memory": True}
        else:
            sp_yolo.data.loader.compose = lambda parcel, _: parcel.data  # type: ignore[attr-defined]
    loader = build_loader(dataset, batch_size=options.batch, shuffle=True, seed=0, workers=workers, **extra)
    cpu, wall = [], []
    for epoch in range(options.rounds + 1):  # the first round starts workers and warms caches
        before, started, shown = cpu_seconds(), time.perf_counter(), 0
        for turn in range(options.images):
            for batch in loader.epoch(epoch * options.images + turn):
                shown += len(batch.metas)
                if shown >= options.images and not workers:
                    break
            if shown >= options.images:
                break
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if epoch:
            cpu.append(1e3 * (cpu_seconds() - before) / shown)
            wall.append(1e3 * (time.perf_counter() - started) / shown)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(LINE.format(workers, statistics.median(cpu), statistics.median(wall), min(wall), max(wall), peak))


def print_composing(dataset: DetectionDataset, size: int) -> None:
    """What a batch costs the GPU: its transfer and the kernel, and the same in torch."""
    from sp_yolo.data import compose  # not in every checkout that may be measured
    from sp_yolo.data.sketch import pack

    parcel = pack([dataset.item(index % len(dataset)).image for index in range(size)])
    pinned, there = (parcel._replace(data=data) for data in (parcel.data.pin_memory(), parcel.data.cuda()))
    out = torch.empty((size, *parcel.hw, 3), dtype=torch.uint8, device="cuda")
    works = {
        "transfer and composition": lambda: compose.compose(pinned, torch.device("cuda")),
        "composition": lambda: compose.compose(there, torch.device("cuda")),
        "composition in torch": lambda: compose._in_torch(there.opened(out.device), out),
    }
    for name, work in works.items():
        work()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(20):
            work()
        last.record()
        torch.cuda.synchronize()
        print(f"{name}: {first.elapsed_time(last) / 20:.3f} ms a batch of {size}, {len(parcel.data) / 1e6:.1f} MB")
    print("kernel used" if not compose._failed else "the kernel does not work here")


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


# --------------------------------------------------------------------------------------------------------------- turns
def make_photos(config: DatasetConfig, folder: Path, size: str) -> DatasetConfig:
    """At most 60 training pictures of ``config`` with their labels, enlarged: YOLO format, JPEG quality 90."""
    width, height = map(int, size.split("x"))
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    data = DetectionDataset(config, "train", 640)
    for index in range(min(len(data), 60)):
        image = cv2.resize(cv2.imread(data.path(index)), (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / "images" / f"{index}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        rows = "".join(f"{int(c)} {' '.join(f'{v:.6f}' for v in box)}\n" for c, *box in data.labels[index])
        (folder / "labels" / f"{index}.txt").write_text(rows)
    (folder / "data.yaml").write_text(f"root: {folder}\ntrain: images\nval: images\nnames: {list(config.names)}\n")
    return load_dataset_config(folder / "data.yaml")


def take_turns(config: DatasetConfig, options: argparse.Namespace) -> None:
    """A table of medians over the rounds, and of the gain over the first line."""
    here = Path(__file__).resolve().parent.parent
    kinds = [(options.against, "off", "cpu")] if options.against else []
    kinds += [(str(here), cache, place) for cache in options.turns for place in ("cpu", "device")]
    found: dict[tuple[str, str, str], list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind in kinds:
            found[kind].append(in_another_process(config, kind, options))
    print("checkout  cache  augmented on  CPU ms/image (median, spread)  images/s per core    gain")
    first = statistics.median(found[kinds[0]])
    for (checkout, cache, place), values in found.items():
        middle = statistics.median(values)
        name = "here" if checkout == str(here) else "other"
        spread = f"{middle:.2f} ({min(values):.2f}..{max(values):.2f})"
        print(f"{name:8s}  {cache:5s}  {place:12s}  {spread:29s}  {1e3 / middle:17.1f}  {first / middle:6.2f}")


def in_another_process(config: DatasetConfig, kind: tuple[str, str, str], options: argparse.Namespace) -> float:
    checkout, cache, place = kind
    command = [sys.executable, __file__, "--data", str(config.path), "--size", str(options.size), "--rounds", "1"]
    command += ["--workers", "0", "--images", str(options.images), "--cache", cache, "--augment-on", place]
    command += ["--batch", str(options.batch), "--set", *options.set]
    told = {**os.environ, "MEASURED_CHECKOUT": checkout, "PYTHONPATH": checkout}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=told)
    match = re.search(r"^ +0 +([\d.]+)", done.stdout, re.MULTILINE)
    if match is None:
        raise SystemExit(done.stdout + done.stderr)
    return float(match[1])


if __name__ == "__main__":
    main()
