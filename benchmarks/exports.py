"""What exporting costs: mAP and images/s of a trained model in each format, into a CSV and the table of docs/deploy.md.

python benchmarks/exports.py --weights best.pt --data data/bccd.yaml --img 224          # all that is installed
python benchmarks/exports.py --weights best.pt --data data/bccd.yaml --img 224 --only openvino-int8
python benchmarks/exports.py --page      # the table of docs/deploy.md from the CSV; --check: exit 1 if stale
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from sp_yolo.backends import RUNTIMES, ExportedModel  # noqa: E402
from sp_yolo.engine.inputs import to_input  # noqa: E402
from sp_yolo.engine.splits import MeasuredSplit, open_dataset, open_measured_split  # noqa: E402
from sp_yolo.engine.validate import CONF_THRES, IOU_THRES, validate  # noqa: E402
from sp_yolo.errors import EnvironmentFault  # noqa: E402
from sp_yolo.export import EndToEnd, export_model  # noqa: E402
from sp_yolo.models import DetectionModel, deploy, model_from_weights  # noqa: E402
from sp_yolo.runtime.device import select_compute  # noqa: E402

RESULTS, PAGE = CHECKOUT / "benchmarks" / "results" / "exports.csv", CHECKOUT / "docs" / "deploy.md"
BLOCK = re.compile(r"(<!-- table: exports -->\n).*?(<!-- end -->)", re.DOTALL)
CALIBRATION = 200  # images
NMS = {"topk": 300, "conf_thres": CONF_THRES, "iou_thres": IOU_THRES}
# name -> (format, flags as the command has them, what export_model is told)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "onnx": ("onnx", "--dynamic --grid", {"dynamic": True, "grid": True}),
    "onnx-maps": ("onnx", "--dynamic", {"dynamic": True}),
    "onnx-fp16": ("onnx", "--dynamic --grid --fp16", {"dynamic": True, "grid": True, "fp16": True}),
    "onnx-end2end": ("onnx", "--dynamic --end2end", {"dynamic": True, "end2end": EndToEnd(**NMS)}),
    "onnx-efficient": (
        "onnx",
        "--dynamic --end2end --end2end-form efficient",
        {"dynamic": True, "end2end": EndToEnd(**NMS, form="efficient")},
    ),
    "torchscript": ("torchscript", "--grid", {"grid": True}),
    "pt2": ("pt2", "--dynamic --grid", {"dynamic": True, "grid": True}),
    "openvino": ("openvino", "--dynamic --grid", {"dynamic": True, "grid": True}),
    "openvino-fp16": ("openvino", "--dynamic --grid --fp16", {"dynamic": True, "grid": True, "fp16": True}),
    "openvino-int8": ("openvino", "--dynamic --grid --int8", {"dynamic": True, "grid": True}),
    "litert": ("litert", "--grid", {"grid": True}),
    "ncnn": ("ncnn", "--grid", {"grid": True}),
    "ncnn-fp16": ("ncnn", "--grid --fp16", {"grid": True, "fp16": True}),
    "coreml": ("coreml", "--grid", {"grid": True}),
    "tensorrt": ("tensorrt", "--grid --fp16", {"grid": True, "fp16": True}),
}


@dataclass(frozen=True)
class Row:
    """One file. ``map50_95``, ``map50``: percent. ``images_per_second``: of CPU time, one image a call, one thread."""

    name: str
    format: str
    flags: str
    map50_95: str
    map50: str
    images_per_second: str
    megabytes: str
    note: str
    runtime: str
    cpu: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a trained model")
    parser.add_argument("--data", default="data/bccd.yaml")
    parser.add_argument("--root", default="", help="where the data lie, if not where the YAML says")
    parser.add_argument("--img", type=int, default=224)
    parser.add_argument("--only", nargs="+", choices=["eager", *CASES], help="measure these rows anew, keep the others")
    parser.add_argument("--page", action="store_true", help="write the table of docs/deploy.md")
    parser.add_argument("--check", action="store_true", help="exit 1 where page and CSV disagree")
    options = parser.parse_args()
    if options.page or options.check:
        return write_page(check=options.check)
    if not options.weights:
        parser.error("--weights is needed to measure")
    torch.set_num_threads(1)
    bench = Bench(options)
    for name in options.only or ["eager", *CASES]:
        row = bench.eager() if name == "eager" else bench.exported(name)
        print(", ".join(f"{value}" for value in asdict(row).values() if value), flush=True)
        store(row)
    return write_page()


class Bench:
    """The weights, and the split that each file is measured on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model: DetectionModel = model_from_weights(options.weights).eval()
        self.compute = select_compute("cpu", "off")
        dataset = open_dataset(options.data, options.root)
        self.split = self._open(dataset, "val", options.img, 0.5)
        calibration = self._open(dataset, "train", options.img, 0.5).loader.epoch(0)
        self.calibration = (to_input(batch.images, self.compute).contiguous().numpy() for batch in calibration)
        shapes = [tuple(batch.images.shape[2:]) for batch in self.split.loader.epoch(0)]
        self.hw = [max(sides) for sides in zip(*shapes, strict=True)]

    def _open(self, dataset: Any, split: str, image_size: int, margin: float) -> MeasuredSplit:
        return open_measured_split(
            dataset, split, image_size=image_size, batch_size=1, stride=32, single_class=False, workers=0, margin=margin
        )

    def eager(self) -> Row:
        """The checkpoint, deployed, as `sp-yolo predict` runs it."""
        network = deploy(self.model).to(memory_format=torch.channels_last).eval()
        return self._row("eager", "PyTorch", "", network, _megabytes_of(network), f"torch {torch.__version__}")

    def exported(self, name: str) -> Row:
        format, flags, told = CASES[name]
        if name.endswith("int8"):
            told = {
                **told,
                "calibration": [images for images, _ in zip(self.calibration, range(CALIBRATION), strict=False)],
            }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"best{RUNTIMES[format].suffix}"
            try:
                result = export_model(self.model, format, output=path, image_size=self.hw, **told)
                megabytes = result.size / 1e6
                if result.max_difference is None:
                    return Row(
                        name,
                        format,
                        flags,
                        "",
                        "",
                        "",
                        f"{megabytes:.1f}",
                        result.note.replace(f"{path}: ", ""),
                        "",
                        "",
                    )
                network = ExportedModel(path)
            except EnvironmentFault as fault:
                return Row(name, format, flags, "", "", "", "", f"not here: {fault}", "", "")
            return self._row(name, format, flags, network, megabytes, _version(format))

    def _row(
        self,
        name: str,
        format: str,
        flags: str,
        network: DetectionModel | ExportedModel,
        megabytes: float,
        runtime: str,
    ) -> Row:
        self.split.evaluator.reset()
        timed = Timed(network)
        validate(timed, self.split.loader.epoch(0), self.split.evaluator, self.compute)
        result, speed = self.split.evaluator.compute(), timed.images_per_second()
        figures = (f"{100 * result.map50_95:.3f}", f"{100 * result.map50:.3f}", f"{speed:.1f}", f"{megabytes:.1f}")
        return Row(name, format, flags, *figures, "", runtime, _processor())


class Timed:
    """A network that counts the CPU time of its calls, which other programs on the machine hardly change."""

    def __init__(self, network: DetectionModel | ExportedModel) -> None:
        self.network, self.times = network, []
        self.names, self.stride = network.names, network.stride

    def __call__(self, images: torch.Tensor, augment: bool = False) -> Any:
        started = time.process_time()
        result = self.network(images, augment=augment)
        self.times.append((time.process_time() - started) / len(images))
        return result

    def images_per_second(self) -> float:
        return 1 / statistics.median(self.times)


def _megabytes_of(model: DetectionModel) -> float:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values()) / 1e6


def _version(format: str) -> str:
    from importlib.metadata import version

    names = {"ai_edge_litert": "ai-edge-litert"}
    package = next(iter(RUNTIMES[format].packages), "torch")
    return f"{package} {version(names.get(package, package))}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def read_rows() -> list[Row]:
    with open(RESULTS, newline="", encoding="utf-8") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def store(row: Row) -> None:
    """Put ``row`` in the place of the one of its name, or behind the others."""
    rows = {each.name: each for each in (read_rows() if RESULTS.is_file() else [])}
    rows[row.name] = row
    order = ["eager", *CASES]
    temporary = RESULTS.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(rows[name]) for name in order if name in rows)
    shutil.move(temporary, RESULTS)


def table(rows: list[Row]) -> list[str]:
    """The Markdown table; differences are from the first row, in points of mAP."""
    eager = next(row for row in rows if row.name == "eager")
    lines = [
        "| `--format` and flags | mAP@.5:.95, % | difference | images/s, one core | MB | runtime |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        called = "checkpoint, PyTorch" if row.name == "eager" else f"`{row.format} {row.flags}`"
        if not row.map50_95:
            lines.append(f"| {called} | {row.note} | | | {row.megabytes} | |")
            continue
        difference = float(row.map50_95) - float(eager.map50_95)
        shown = "" if row.name == "eager" else f"{difference:+.3f}"
        cells = (called, f"{float(row.map50_95):.2f}", shown, row.images_per_second, row.megabytes, row.runtime)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_page(check: bool = False) -> int:
    """Returns the exit code: 1 where ``check`` found the page stale."""
    before = PAGE.read_text(encoding="utf-8")
    lines = "\n".join(table(read_rows()))
    after = BLOCK.sub(lambda found: f"{found[1]}\n{lines}\n\n{found[2]}", before)
    if check:
        if after != before:
            print(f"stale: {PAGE}; run python benchmarks/exports.py --page", file=sys.stderr)
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
