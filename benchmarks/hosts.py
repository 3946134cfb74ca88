"""SP at its defaults against a host's own optimizer, in the host's own trainer: equal epochs, seeds, the host's metric.

    python benchmarks/hosts.py --root data/few/aquarium --epochs 40 --img 160 --seeds 0 1 2 \\
        --yolov7 DIR --ultralytics DIR --csv studies/results/hosts/rows.csv

``--yolov7`` and ``--ultralytics``: folders of packages (pip install --target) that hold yolov7detect and ultralytics;
one that is not given is left out. ``--root``: a folder with data.yaml, images/ and labels/ of train and val.
yolov7-tiny and yolo11n train from scratch in batches of 16; each arm is told data, size, epochs and seed, and
ultralytics a nominal batch of 16, without which 40 epochs of 176 images are 110 steps; nothing else. MuSGD
orthogonalises in float32 here: in bfloat16 an epoch takes 83 seconds instead of 10 on a processor without it. A row is
added to ``--csv`` after each run; a run that is there already is not made again. mAP is the host's, after the last
epoch; seconds are the processor's, on one thread, start and validations included. The table in docs/plugins.md is made
from the rows by docs/generate_results.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sp_yolo.experiments.compare.execute import commit
from sp_yolo.experiments.rows import append_row, raw_rows

REPOSITORY = Path(__file__).resolve().parents[1]

# Arms by host; the first is the host's default.
ARMS = {"yolov7": ("sgd", "sp"), "ultralytics": ("auto", "MuSGD", "sp")}
COLUMNS = ("host", "arm", "seed", "epochs", "image_size", "map50", "map50_95", "seconds_per_epoch", "commit")

# The host seeds itself with a number of its own: another seed is that number and so many more.
YOLOV7 = """
import random, runpy, sys
import numpy, torch
from sp_yolo.plugins.compat import modern_stack
from sp_yolo.plugins.yolov7 import run_script
site, arm, seed, argv = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
sys.path.append(site)
torch.set_num_threads(1)
for owner, name in ((random, "seed"), (numpy.random, "seed"), (torch, "manual_seed")):
    setattr(owner, name, lambda number, seeded=getattr(owner, name): seeded(number + seed))
if arm == "sp":
    sys.exit(run_script(f"{site}/yolov7", argv))
sys.argv = ["train.py", *argv]
with modern_stack(lambda: None):
    runpy.run_module("yolov7.train", run_name="__main__", alter_sys=True)
"""
ULTRALYTICS = """
import json, sys
import torch
sys.path.append(sys.argv[1])
from ultralytics import YOLO
from sp_yolo.plugins import SPTrainer
arm, settings = sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
torch.Tensor.bfloat16 = torch.Tensor.float
own = {"trainer": SPTrainer} if arm == "sp" else {"optimizer": arm}
YOLO("yolo11n.yaml").train(**settings, **own)
"""


def write_data(root: Path, folder: Path) -> Path:
    """Links to the images, copies of the labels, and a data.yaml with whole paths: hosts write caches beside labels."""
    import yaml

    names = yaml.safe_load((root / "data.yaml").read_text())["names"]
    lines = [f"nc: {len(names)}\nnames: {json.dumps(names)}\n"]
    for split in ("train", "val"):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / split).symlink_to((root / "images" / split).resolve())
        shutil.copytree(root / "labels" / split, folder / "labels" / split)
        lines.append(f"{split}: {folder}/images/{split}\n")
    path = folder / "data.yaml"
    path.write_text("".join(lines))
    return path


def command(host: str, arm: str, seed: int, options: argparse.Namespace, data: Path) -> list[str]:
    """What trains one arm in the folder of ``data``."""
    site, epochs, size = getattr(options, host), options.epochs, options.img
    if host == "ultralytics":
        settings = {"data": str(data), "epochs": epochs, "imgsz": size, "seed": seed, "device": "cpu", "workers": 0}
        settings |= {"batch": 16, "nbs": 16, "project": str(data.parent), "name": "run", "plots": False}
        return [sys.executable, "-c", ULTRALYTICS, site, arm, json.dumps(settings)]
    cfg = data.with_name("cfg.yaml")
    text = (REPOSITORY / "sp_yolo" / "models" / "cfg" / "yolov7-tiny.yaml").read_text()
    cfg.write_text(text.replace("nc: 80", data.read_text().splitlines()[0]))
    flags = f"--weights= --cfg {cfg} --data {data} --hyp {REPOSITORY}/hyp/hyp.scratch.tiny.yaml --epochs {epochs}"
    flags += f" --img-size {size} {size} --batch-size 16 --device cpu --workers 0 --project {data.parent} --name run"
    return [sys.executable, "-c", YOLOV7, site, arm, str(seed), *flags.split()]


def figures(host: str, run: Path) -> tuple[float, float]:
    """mAP@.5 and mAP of the last epoch, from the host's own log."""
    if host == "yolov7":
        words = (run / "results.txt").read_text().splitlines()[-1].split()
        return float(words[10]), float(words[11])
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    return float(rows[-1]["metrics/mAP50(B)"]), float(rows[-1]["metrics/mAP50-95(B)"])


def measure(host: str, arm: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    """One run, as a row.

    Raises:
        SystemExit: the host failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_data(Path(options.root), folder)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "disabled", "YOLO_OFFLINE": "true"}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "YOLO_CONFIG_DIR": scratch}
        before = _children_seconds()
        done = subprocess.run(
            command(host, arm, seed, options, data), cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{host} {arm} {seed}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
        seconds = (_children_seconds() - before) / options.epochs
        map50, map50_95 = figures(host, folder / "run")
    values = (host, arm, seed, options.epochs, options.img, map50, map50_95, round(seconds, 2), commit())
    return dict(zip(COLUMNS, values, strict=True))


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--yolov7", default="")
    parser.add_argument("--ultralytics", default="")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--img", type=int, default=160)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args()
    runs = [
        (host, arm, seed) for seed in options.seeds for host in ARMS if getattr(options, host) for arm in ARMS[host]
    ]
    for host, arm, seed in runs:
        key = (host, arm, str(seed), str(options.epochs), str(options.img))
        if key not in [tuple(row[name] for name in COLUMNS[:5]) for row in raw_rows(options.csv)]:
            append_row(options.csv, COLUMNS, measure(host, arm, seed, options))


if __name__ == "__main__":
    main()
