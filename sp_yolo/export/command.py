"""The command ``sp-yolo export``."""

from __future__ import annotations

import argparse

from sp_yolo.engine.device import select_device
from sp_yolo.export.end2end import EndToEnd
from sp_yolo.export.files import FORMATS, export_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``sp-yolo export``."""
    add = parser.add_argument
    add("--weights", required=True, help="checkpoint: ours, the original's .pt, a state_dict, .safetensors")
    add("--format", default="onnx", choices=list(FORMATS))
    add("--img-size", "--img", "--imgsz", nargs="+", type=int, default=[640, 640], help="height width, or one side")
    add("--batch-size", "--batch", type=int, default=1)
    add("--dynamic", action="store_true", help="ONNX: batch, height and width may vary")
    add("--dynamic-batch", action="store_true", help="ONNX: the batch may vary")
    add("--grid", action="store_true", help="decoded boxes instead of raw maps")
    add("--end2end", action="store_true", help="ONNX: with NMS; implies --grid")
    add("--max-wh", type=float, default=EndToEnd.max_wh, help="pixels between classes in NMS; 0: NMS over all classes")
    add("--topk-all", type=int, default=EndToEnd.topk, help="detections kept per image")
    add("--iou-thres", "--iou", type=float, default=EndToEnd.iou_thres)
    add("--conf-thres", "--conf", type=float, default=EndToEnd.conf_thres)
    add("--device", default="cpu", help="cpu, or a GPU number")
    add("--simplify", action="store_true", help="ONNX: fold constants")
    add("--fp16", action="store_true", help="half-precision weights and images")


def run(arguments: argparse.Namespace) -> int:
    """``sp-yolo export``: prints the file, its outputs and how far they are from the model's."""
    size = arguments.img_size * 2 if len(arguments.img_size) == 1 else arguments.img_size
    nms_settings = EndToEnd(arguments.topk_all, arguments.iou_thres, arguments.conf_thres, arguments.max_wh)
    result = export_model(
        arguments.weights,
        arguments.format,
        image_size=size,
        batch_size=arguments.batch_size,
        grid=arguments.grid,
        end2end=nms_settings if arguments.end2end else None,
        dynamic=arguments.dynamic,
        dynamic_batch=arguments.dynamic_batch,
        fp16=arguments.fp16,
        simplify=arguments.simplify,
        device=select_device(arguments.device),
    )
    megabytes = result.path.stat().st_size / 1e6
    print(
        f"{result.path} ({megabytes:.1f} MB): {', '.join(result.outputs)}; "
        f"largest difference from the model: {result.max_difference:.2e}"
    )
    return 0
