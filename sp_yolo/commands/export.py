"""`sp-yolo export`: write a file that other runtimes execute, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sp_yolo.config import REQUIRED, Rule, option
from sp_yolo.export.compact import compact_file
from sp_yolo.export.end2end import EndToEnd
from sp_yolo.export.files import FORMATS, export_model
from sp_yolo.runtime.device import select_device

EXAMPLES = """
  {prog} --weights best.pt --format onnx --img 640 --dynamic
  {prog} --weights best.pt --format onnx --end2end --conf-thres 0.25
  {prog} --weights best.pt --format torchscript --grid
"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export."""

    weights: str = option(REQUIRED, "checkpoint: ours, the original's .pt, a state_dict, .safetensors")
    format: str = option("onnx", "file format", rule=Rule(words=tuple(FORMATS)))
    img_size: tuple[int, ...] = option((640, 640), "height width, or one side", "--img-size", "--img", "--imgsz")
    batch_size: int = option(1, "images per call", "--batch-size", "--batch")
    dynamic: bool = option(False, "ONNX: batch, height and width may vary")
    dynamic_batch: bool = option(False, "ONNX: the batch may vary")
    grid: bool = option(False, "decoded boxes instead of raw maps; the file is best-grid.onnx instead of best.onnx")
    end2end: bool = option(False, "ONNX: with NMS; the file is best-end2end.onnx")
    max_wh: float = option(EndToEnd.max_wh, "pixels between classes in NMS; 0: NMS over all classes")
    topk_all: int = option(EndToEnd.topk, "detections kept per image")
    iou_thres: float = option(EndToEnd.iou_thres, "of NMS", "--iou-thres", "--iou")
    conf_thres: float = option(EndToEnd.conf_thres, "least confidence of a detection", "--conf-thres", "--conf")
    device: str = option("cpu", "cpu, or a GPU number")
    simplify: bool = option(False, "ONNX: fold constants")
    fp16: bool = option(False, "half-precision weights and images")
    compact: bool = option(False, "first cut out the channels that training removed, into NAME-compact.pt")

    @staticmethod
    def prepare(given: Mapping[str, Any]) -> dict[str, Any]:
        """One size stands for both sides."""
        size = given.get("img_size", ())
        return {**given, "img_size": list(size) * 2} if len(size) == 1 else dict(given)


OPTIONS = (ExportOptions,)


def run(options: ExportOptions) -> int:
    """Print the file, its outputs and how far they are from the model's; returns the exit code."""
    weights = options.weights
    if options.compact:
        path, report = compact_file(weights, max(options.img_size))
        print(f"{path}: {report}; largest difference from the model: {report.difference:.2e}")
        weights = str(path)
    nms_settings = EndToEnd(options.topk_all, options.iou_thres, options.conf_thres, options.max_wh)
    result = export_model(
        weights,
        options.format,
        image_size=options.img_size,
        batch_size=options.batch_size,
        grid=options.grid,
        end2end=nms_settings if options.end2end else None,
        dynamic=options.dynamic,
        dynamic_batch=options.dynamic_batch,
        fp16=options.fp16,
        simplify=options.simplify,
        device=select_device(options.device),
    )
    megabytes = result.path.stat().st_size / 1e6
    print(
        f"{result.path} ({megabytes:.1f} MB): {', '.join(result.outputs)}; "
        f"largest difference from the model: {result.max_difference:.2e}"
    )
    return 0
