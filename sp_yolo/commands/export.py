"""`sp-yolo export`: write a file that other runtimes execute, checked against the model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F

from sp_yolo.commands.inference import data_of, training_options
from sp_yolo.config import REQUIRED, Rule, option
from sp_yolo.engine.splits import open_measured_split
from sp_yolo.export.compact import compact_file
from sp_yolo.export.end2end import FORMS, EndToEnd
from sp_yolo.export.files import export_model
from sp_yolo.export.formats import FORMATS
from sp_yolo.models import read_checkpoint
from sp_yolo.models.weights.published import find_weights
from sp_yolo.runtime.device import select_device

EXAMPLES = """
  {prog} --weights best.pt --format onnx --img 640 --dynamic
  {prog} --weights best.pt --format onnx --end2end --end2end-form efficient
  {prog} --weights best.pt --format openvino --dynamic --int8 --data mine.yaml
"""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Export."""

    weights: str = option(REQUIRED, "checkpoint (ours, the original's .pt, a state_dict, .safetensors), or yolov7, ..")
    offline: bool = option(False, "download no weights; their file is named instead")
    format: str = option("onnx", "file format", rule=Rule(words=tuple(FORMATS)))
    img_size: tuple[int, ...] = option((640, 640), "height width, or one side", "--img-size", "--img", "--imgsz")
    batch_size: int = option(1, "images per call", "--batch-size", "--batch")
    dynamic: bool = option(False, "ONNX: batch, height and width may vary")
    dynamic_batch: bool = option(False, "ONNX: the batch may vary")
    grid: bool = option(False, "decoded boxes instead of raw maps; the file is best-grid.onnx instead of best.onnx")
    end2end: bool = option(False, "ONNX: with NMS; the file is best-end2end.onnx")
    end2end_form: str = option(
        "rows",
        "one output, a row per detection; TensorRT's four outputs by standard operators; or by its plug-in",
        rule=Rule(words=FORMS),
    )
    max_wh: float = option(EndToEnd.max_wh, "pixels between classes in NMS; 0: NMS over all classes")
    topk_all: int = option(EndToEnd.topk, "detections kept per image")
    iou_thres: float = option(EndToEnd.iou_thres, "of NMS", "--iou-thres", "--iou")
    conf_thres: float = option(EndToEnd.conf_thres, "least confidence of a detection", "--conf-thres", "--conf")
    device: str = option("cpu", "cpu, or a GPU number")
    simplify: bool = option(False, "ONNX: fold constants")
    fp16: bool = option(False, "half-precision weights; of onnx, torchscript and pt2 images too")
    int8: bool = option(False, "OpenVINO: all but the head in INT8, calibrated on training images")
    data: str = option("", "--int8: dataset YAML or folder (default: the one the weights were trained on)")
    calibration_images: int = option(300, "--int8: images to calibrate on", rule=Rule(1, 100000))
    compact: bool = option(False, "first cut out the channels that training removed, into NAME-compact.pt")

    @staticmethod
    def prepare(given: Mapping[str, Any]) -> dict[str, Any]:
        """One size stands for both sides."""
        size = given.get("img_size", ())
        return {**given, "img_size": list(size) * 2} if len(size) == 1 else dict(given)


OPTIONS = (ExportOptions,)


def run(options: ExportOptions) -> int:
    """Print the file, its outputs and how far they are from the model's; returns the exit code."""
    weights = find_weights(options.weights, offline=options.offline)
    if options.compact:
        path, report = compact_file(weights, max(options.img_size))
        print(f"{path}: {report}; largest difference from the model: {report.difference:.2e}")
        weights = str(path)
    nms_settings = EndToEnd(
        options.topk_all, options.iou_thres, options.conf_thres, options.max_wh, options.end2end_form
    )
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
        calibration=_calibration(options, weights) if options.int8 else None,
        device=select_device(options.device),
    )
    megabytes = result.size / 1e6
    checked = "" if result.max_difference is None else f"largest difference from the model: {result.max_difference:.2e}"
    print(f"{result.path} ({megabytes:.1f} MB): {', '.join(result.outputs)}; {checked or result.note}")
    return 0


def _calibration(options: ExportOptions, weights: str) -> list[np.ndarray]:
    """Training images as the file will see them: float32 [batch, 3, H, W] in 0..1, filled up with gray."""
    trained = training_options(read_checkpoint(weights))
    dataset = data_of(options.data, trained)
    height, width = options.img_size
    split = open_measured_split(
        dataset,
        "train",
        image_size=max(height, width),
        batch_size=1,
        stride=32,
        single_class=False,
        workers=0,
        margin=0.0,
    )
    images = []
    for batch in itertools.islice(split.loader.epoch(0), options.calibration_images):
        pixels = batch.images[..., :height, :width].float() / 255
        border = (0, width - pixels.shape[3], 0, height - pixels.shape[2])
        images.append(F.pad(pixels, border, value=114 / 255).repeat(options.batch_size, 1, 1, 1).numpy())
    return images
