"""What a user gets out of the box in equal time: train_sp.py, the original YOLOv7 and ultralytics, each as it comes.

    python benchmarks/out_of_the_box.py --data data/few-aquarium.yaml --minutes 10 --original PYTHON|DIR \\
        --ultralytics yolo11n yolov8n --csv studies/results/out-of-the-box/rows.csv

Every trainer starts from scratch with its own recipe, optimizer and schedule; it is told the data, the image size, the
batch size and the number of epochs that fill the time. The time is the processor's, start and validations included, on
one thread: on an idle core the same as the clock's, on a busy machine still equal for all. Two short runs measure first
what an epoch costs. Each trainer's own best weights find boxes on the test split as its own val does (confidence .001),
and pycocotools scores all alike. A row is added to ``--csv`` after each run; a run that is there already is not made
again. ``--original``: an interpreter that can import PyPI's yolov7detect, or a folder of packages that holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sp_yolo.experiments.rows import append_row, raw_rows

REPOSITORY = Path(__file__).resolve().parents[1]

COLUMNS = ("data", "trainer", "image_size", "epochs", "seed", "cpu_seconds", "map50", "map50_95", "versions", "commit")
# As `python -c`: the original's trainer on a current stack, with its own optimizer.
ORIGINAL = """
import runpy, sys
from sp_yolo.plugins.compat import modern_stack
with modern_stack(lambda: None):
    runpy.run_module("yolov7.train", run_name="__main__", alter_sys=True)
"""
ULTRALYTICS = """
import json, sys
import torch
from ultralytics import YOLO
torch.set_num_threads(1)
model, settings = sys.argv[1], json.loads(sys.argv[2])
YOLO(f"{model}.yaml").train(**settings)
"""
# Boxes of each image, in its pixels, as its own validation asks for them.
PREDICT = """
import json, sys
from ultralytics import YOLO
weights, size, paths = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
found = {}
for path in paths:
    boxes = YOLO.predict(MODEL, path, imgsz=size, conf=0.001, iou=0.7, max_det=300, verbose=False)[0].boxes
    found[path] = [[*xyxy, score, label] for xyxy, score, label in
                   zip(boxes.xyxy.tolist(), boxes.conf.tolist(), boxes.cls.tolist())]
json.dump(found, open(sys.argv[4], "w"))
""".replace("found = {}", "found, MODEL = {}, YOLO(weights)")


class Bench:
    """One data set: its files for the other trainers, and what runs share."""

    def __init__(self, data: str, options: argparse.Namespace, folder: Path) -> None:
        from sp_yolo.engine.splits import open_dataset

        self.data, self.options, self.folder = data, options, folder
        self.dataset = open_dataset(data)
        self.yaml = self._plain_yaml()
        self.environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            "PYTHONPATH": os.pathsep.join((str(REPOSITORY), *options.packages)),
            "WANDB_MODE": "disabled",
            "YOLO_CONFIG_DIR": str(folder),
        }

    def _plain_yaml(self) -> Path:
        """YOLO txt labels and links to the images: what every trainer reads."""
        from sp_yolo.data import DetectionDataset

        lines = []
        for split in ("train", "val", "test"):
            data = DetectionDataset(self.dataset, split, self.options.img)
            for kind in ("images", "labels"):
                (self.folder / kind / split).mkdir(parents=True)
            for number in range(len(data)):
                path = Path(data.path(number))
                (self.folder / "images" / split / path.name).symlink_to(path.resolve())
                rows = [f"{int(r[0])} " + " ".join(f"{v:.6f}" for v in r[1:5]) + "\n" for r in data.labels[number]]
                (self.folder / "labels" / split / f"{path.stem}.txt").write_text("".join(rows))
            lines.append(f"{split}: {self.folder}/images/{split}\n")
        names = list(self.dataset.names)
        path = self.folder / "data.yaml"
        path.write_text("".join(lines) + f"nc: {len(names)}\nnames: {json.dumps(names)}\n")
        return path

    def command(self, trainer: str, epochs: int, name: str) -> list[str]:
        options = self.options
        place = str(self.folder / trainer)
        if trainer in options.ultralytics:
            settings = {"data": str(self.yaml), "imgsz": options.img, "batch": 16, "epochs": epochs, "device": "cpu"}
            settings |= {"workers": 0, "project": place, "name": name, "exist_ok": True, "seed": options.seed}
            if name != "run":  # its last ten epochs have no mosaics and cost less
                settings["close_mosaic"] = 0
            return [sys.executable, "-c", ULTRALYTICS, trainer, json.dumps(settings)]
        flags = ["--data", str(self.yaml), "--epochs", str(epochs), "--batch-size", "16", "--project", place]
        flags += ["--name", name, "--exist-ok", "--img-size", *[str(options.img)] * 2, "--workers", "0"]
        if trainer == "sp-yolo":
            return [sys.executable, str(REPOSITORY / "train_sp.py"), *flags, "--seed", str(options.seed)]
        cfg = self.folder / "yolov7-tiny.yaml"
        text = (REPOSITORY / "sp_yolo" / "models" / "cfg" / cfg.name).read_text()
        cfg.write_text(text.replace("nc: 80", f"nc: {len(self.dataset.names)}"))
        flags += ["--weights", "", "--cfg", str(cfg), "--device", "cpu"]
        flags += ["--hyp", str(REPOSITORY / "hyp" / "hyp.scratch.tiny.yaml")]
        python = options.original if Path(options.original).is_file() else sys.executable
        return [python, "-c", ORIGINAL, *flags]

    def train(self, trainer: str, epochs: int, name: str) -> float:
        """Seconds of the processor for a whole run.

        Raises:
            SystemExit: the trainer failed; with the end of what it printed.
        """
        before = _children_seconds()
        log = self.folder / f"{trainer}-{name}.txt"
        with open(log, "w") as output:
            done = subprocess.run(
                self.command(trainer, epochs, name),
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=output,
                check=False,
            )
        if done.returncode:
            sys.exit(f"{trainer}: exit code {done.returncode}\n{log.read_text()[-3000:]}")
        return _children_seconds() - before

    def epochs_for(self, trainer: str) -> int:
        """As many as fill the time."""
        one, three = (self.train(trainer, epochs, f"probe{epochs}") for epochs in (1, 3))
        epoch = max((three - one) / 2, 1e-3)
        return max(int((60 * self.options.minutes - (one - epoch)) / epoch), 1)

    def score(self, trainer: str) -> Any:
        """EvalResult on the test split of the best weights."""
        from sp_yolo.engine.inputs import round_up, size_grid
        from sp_yolo.engine.splits import open_measured_split
        from sp_yolo.engine.validate import validate
        from sp_yolo.models import model_from_weights
        from sp_yolo.runtime.device import select_compute

        weights = self.folder / trainer / "run" / "weights" / "best.pt"
        sizes = {"batch_size": 16, "single_class": False, "workers": 0}
        if trainer in self.options.ultralytics:
            data = open_measured_split(self.dataset, "test", image_size=self.options.img, stride=32, **sizes)
            self._add_ultralytics(data, weights)
            return data.evaluator.compute()
        compute = select_compute("cpu", "off")
        model = model_from_weights(str(weights)).float().eval()
        stride = size_grid(model)
        size = round_up(self.options.img, stride)
        data = open_measured_split(self.dataset, "test", image_size=size, stride=stride, **sizes)
        validate(model, data.loader.epoch(0), data.evaluator, compute)
        return data.evaluator.compute()

    def _add_ultralytics(self, data: Any, weights: Path) -> None:
        import torch

        metas = [meta for batch in data.loader.epoch(0) for meta in batch.metas]
        paths, found = [str(meta.path) for meta in metas], self.folder / "found.json"
        command = [sys.executable, "-c", PREDICT, str(weights), str(self.options.img), json.dumps(paths), str(found)]
        subprocess.run(command, cwd=self.folder, env=self.environment, check=True, capture_output=True)
        boxes = json.loads(found.read_text())
        rows = [torch.tensor(boxes[path], dtype=torch.float64).reshape(-1, 6) for path in paths]
        data.evaluator.update([meta.image_id for meta in metas], rows)


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def versions(trainer: str) -> str:
    """Of the trainer's package and of torch."""
    import importlib.metadata

    import torch

    package = {"sp-yolo": "sp-yolo", "original": "yolov7detect"}.get(trainer, "ultralytics")
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # in another interpreter or folder
        found = ""
    return f"{package} {found}".strip() + f", torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="YAML")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--img", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--original", default="", metavar="PYTHON|DIR")
    parser.add_argument("--ultralytics", nargs="*", default=[], metavar="MODEL")
    parser.add_argument("--packages", nargs="*", default=[], metavar="DIR", help="folders that hold other packages")
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args()
    from sp_yolo.experiments.compare.execute import commit

    if Path(options.original).is_dir():
        options.packages.append(options.original)
    for data in options.data:
        name = Path(data).stem
        for trainer in ("sp-yolo", *(["original"] if options.original else []), *options.ultralytics):
            known = [[row[key] for key in ("data", "trainer", "image_size", "seed")] for row in raw_rows(options.csv)]
            if [name, trainer, str(options.img), str(options.seed)] in known:
                continue
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(data, options, Path(folder).resolve())
                epochs = bench.epochs_for(trainer)
                seconds = bench.train(trainer, epochs, "run")
                result = bench.score(trainer)
            row = {"data": name, "trainer": trainer, "image_size": options.img, "epochs": epochs, "seed": options.seed}
            row |= {"cpu_seconds": round(seconds), "map50": round(float(result.map50), 4)}
            row |= {"map50_95": round(float(result.map50_95), 4), "versions": versions(trainer), "commit": commit()}
            append_row(options.csv, COLUMNS, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
