"""`sp-yolo val`: measure weights on a split (the original's test.py), by the same code as the trainer's validation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sp_yolo.engine import build
from sp_yolo.engine.device import select_compute
from sp_yolo.engine.inputs import round_up, size_grid
from sp_yolo.engine.pictures import RunPictures
from sp_yolo.engine.review import describe
from sp_yolo.engine.rundir import RunDir
from sp_yolo.engine.validate import COMPAT_IOU_THRES, CONF_THRES, IOU_THRES, to_original, validate
from sp_yolo.errors import UserError
from sp_yolo.eval import OriginalResult, per_class_table, write_report, yolov7_evaluate
from sp_yolo.inference import add_inference_arguments, check_flags, yolo_lines
from sp_yolo.models import follow_names, model_from_weights, read_checkpoint

SPEED_CONF, SPEED_IOU = 0.25, 0.45  # thresholds of --task speed, those of detection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_inference_arguments(parser, image_size=None, conf_thres=CONF_THRES, iou_thres=None, project="runs/test")
    parser.add_argument("--data", default="", help="dataset YAML (default: the one the weights were trained on)")
    parser.add_argument(
        "--batch-size", "--batch", type=int, help="default: the training's, or 32; no figure depends on it"
    )
    parser.add_argument("--task", choices=("train", "val", "test", "speed"), default="val")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), help="default: as the training, or auto")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--single-cls", action="store_true", help="treat all classes as one, the model's too")
    parser.add_argument("--verbose", action="store_true", help="per-class rows are always printed; accepted")
    parser.add_argument("--save-hybrid", action="store_true", help="as --save-txt, the labels added before NMS")
    parser.add_argument("--save-json", action="store_true", help="<weights>_predictions.json in COCO's results format")
    parser.add_argument(
        "--v5-metric", action="store_true", help="the line of the original's own metric as its --v5-metric has it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write the report; returns the exit code.

    Raises:
        UserError: weights and data do not fit together, or a flag is out of its bounds.
    """
    check_flags(arguments)
    model = model_from_weights(arguments.weights)
    trained = _training_options(arguments.weights)
    group = _as_trained(arguments, trained)
    compute = select_compute(arguments.device, arguments.amp)
    data = arguments.data or trained.get("data")
    if not data:
        raise UserError("--data: give the dataset YAML (these weights do not name one)")
    dataset = build.open_dataset(data, None if arguments.data else trained.get("overrides", {}).get("root"))
    single = arguments.single_cls or bool(trained.get("single_cls") and model.num_classes == 1)
    classes = len(dataset.class_names(single))
    if model.num_classes != classes and not single:
        raise UserError(f"{arguments.weights}: {model.num_classes} classes, but {dataset.path} has {classes}")
    if not single and (words := follow_names(model, model.names, dataset.names)):
        print(words)
    stride = size_grid(model)
    size = round_up(arguments.img_size, stride)
    split = "val" if arguments.task == "speed" else arguments.task
    data_set, loader, evaluator = build.build_val_data(
        dataset,
        split,
        image_size=size,
        batch_size=arguments.batch_size,
        stride=stride,
        single_class=single,
        workers=arguments.workers,
        device=compute.device,
        padding_group=group,
    )
    print("\n".join([*dataset.notes, *describe(split, data_set)]))
    if not data_set.tally.boxes:
        print(f"warning: {split}: not one label in {len(data_set)} images: the mAP says nothing")
    folder = RunDir.create(arguments.project, arguments.name, arguments.exist_ok)
    texts = (
        _TextFiles(folder.path / "labels", arguments.save_conf) if arguments.save_txt or arguments.save_hybrid else None
    )
    pictures = RunPictures(folder.path, data_set.names, tensorboard=False)

    def on_batch(index: int, batch: Any, found: list[torch.Tensor]) -> None:
        pictures.val_batch(index, batch, found)
        if texts:
            texts.write(batch, found)

    speed = arguments.task == "speed"
    model = model.to(compute.device).to(memory_format=torch.channels_last).eval()
    print(f"{compute.words}; {size} px, batch {arguments.batch_size}, split {split}")
    outcome = validate(
        model,
        loader.epoch(0),
        evaluator,
        compute,
        conf_thres=SPEED_CONF if speed else arguments.conf_thres,
        iou_thres=SPEED_IOU if speed else arguments.iou_thres,
        augment=arguments.augment,
        hybrid=arguments.save_hybrid,
        single_class=single,
        on_batch=None if speed else on_batch,
    )
    each = {stage: 1000 * seconds / max(outcome.images, 1) for stage, seconds in outcome.seconds.items()}
    where = f"per image at batch {arguments.batch_size}"
    print(f"Speed: {each['inference']:.1f} ms inference, {each['nms']:.1f} ms NMS {where}")
    if speed:
        return 0
    result = evaluator.compute()
    truth, found = data_set.ground_truth(), evaluator.detections()
    print(f"{per_class_table(result)}\n\n{result.summary_text}")
    if arguments.save_hybrid:
        print("\n--save-hybrid: the labels are among the detections, so these figures are no measurement of the model")
    print(_original_words(yolov7_evaluate(truth, found, v5_metric=arguments.v5_metric)))
    if arguments.save_json:
        folder.write(f"{Path(arguments.weights).stem}_predictions.json", json.dumps(found))
    facts = {"weights": arguments.weights, "data": str(dataset.path), "split": split, "device": compute.words}
    notes = write_report(
        folder.path,
        result,
        truth,
        found,
        title=f"{Path(arguments.weights).name} on {dataset.path.name}",
        facts=facts,
        read_image=build.image_reader(data_set),
    )
    print("\n".join([*notes, f"results in {folder.path}"]))
    return 0


def _original_words(result: OriginalResult) -> str:
    return (
        f"\nFor comparison with logs of the original, its own metric: P {result.precision:.3f}, R {result.recall:.3f}, "
        f"mAP@.5 {result.map50:.3f}, mAP@.5:.95 {result.map50_95:.3f}"
    )


def _as_trained(arguments: argparse.Namespace, trained: Mapping[str, Any]) -> int:
    """Fill in what was not given so that the figures are the training's; images that are padded to one shape."""
    group = 2 * trained["batch_size"] if isinstance(trained.get("batch_size"), int) else 32  # as the trainer does
    if arguments.batch_size is not None and arguments.batch_size > group:
        print(f"--batch-size {arguments.batch_size} lowered to {group}: images are padded in groups as in the training")
    arguments.batch_size = min(arguments.batch_size or group, group)
    arguments.img_size = arguments.img_size or (trained.get("img_size") or [0, 640])[1]
    if arguments.iou_thres is None:
        arguments.iou_thres = COMPAT_IOU_THRES if trained.get("compat") else IOU_THRES
    if arguments.amp is None:
        arguments.amp = {"off": "off", "bf16": "bf16"}.get(trained.get("amp", ""), "auto")
    return group


def _training_options(weights: str) -> dict[str, Any]:
    """What the weights' run was told, where the file says so."""
    content = read_checkpoint(weights)
    options = content.get("config") if isinstance(content, dict) else None
    return options if isinstance(options, dict) else {}


class _TextFiles:
    """One YOLO txt per image: class cx cy w h [confidence], normalised by the original image, best detection last."""

    def __init__(self, folder: Path, with_confidence: bool) -> None:
        self.folder, self.with_confidence = folder, with_confidence
        self._taken: dict[str, int] = {}
        folder.mkdir(exist_ok=True)

    def write(self, batch: Any, found: list[torch.Tensor]) -> None:
        _, detections = to_original(batch, found)
        for meta, rows in zip(batch.metas, detections, strict=True):
            lines = yolo_lines(rows, meta.original_hw, self.with_confidence)
            stem = self._free_stem(Path(meta.path).stem)
            (self.folder / f"{stem}.txt").write_text(lines, encoding="utf-8")

    def _free_stem(self, stem: str) -> str:
        """``stem``, or with a number behind it: images of one name in several folders must not overwrite each other."""
        self._taken[stem] = count = self._taken.get(stem, 0) + 1
        return stem if count == 1 else self._free_stem(f"{stem}_{count}")
