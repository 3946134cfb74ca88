"""`sp-yolo val`: measure weights on a split (the original's test.py), by the same code as the trainer's validation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sp_yolo.backends import ExportedModel, runtime_of
from sp_yolo.commands.inference import (
    SHARE,
    DeviceOptions,
    FreeNames,
    InferenceOptions,
    OutputOptions,
    data_of,
    training_options,
    yolo_lines,
)
from sp_yolo.config import DatasetConfig, Rule, option
from sp_yolo.data import Batch
from sp_yolo.engine.inputs import round_up, size_grid
from sp_yolo.engine.review import describe
from sp_yolo.engine.splits import MeasuredSplit, open_measured_split
from sp_yolo.engine.summary import model_facts
from sp_yolo.engine.validate import COMPAT_IOU_THRES, CONF_THRES, IOU_THRES, to_original, validate
from sp_yolo.errors import UserError
from sp_yolo.eval import OriginalResult, yolov7_evaluate
from sp_yolo.models import DetectionModel, follow_names, model_from_weights, read_checkpoint
from sp_yolo.report import per_class_table, write_report
from sp_yolo.report.training import RunPictures
from sp_yolo.runtime.device import Compute, select_compute
from sp_yolo.runtime.folder import RunDir

SPEED_CONF, SPEED_IOU = 0.25, 0.45  # thresholds of --task speed, those of detection


EXAMPLES = """
  {prog} --weights runs/train/exp/weights/best.pt
  {prog} --weights yolov7.pt --data data/coco.yaml --img 640 --save-json
  {prog} --weights best.pt --data mine.yaml --task test --name final
"""


@dataclass(frozen=True, kw_only=True)
class MeasuringDevice(DeviceOptions):
    """Device and speed."""

    amp: str | None = option(
        None, "precision (default: as the training, or auto)", rule=Rule(words=("auto", "off", "bf16", "fp16"))
    )
    workers: int = option(8, "loader processes (default 8; on a CPU 1 at most)", rule=Rule(0, 1024))


@dataclass(frozen=True, kw_only=True)
class ValOptions(InferenceOptions, OutputOptions, MeasuringDevice):
    """Measuring."""

    conf_thres: float = option(CONF_THRES, "least confidence of a detection", "--conf-thres", "--conf", rule=SHARE)
    project: str = option("runs/test", "folder of run directories")
    data: str = option("", "dataset YAML or folder (default: the one the weights were trained on)")
    batch_size: int | None = option(
        None, "default: the training's, or 32; no figure depends on it", "--batch-size", "--batch", rule=Rule(1, 65536)
    )
    task: str = option("val", "split, or the time alone", rule=Rule(words=("train", "val", "test", "speed")))
    single_cls: bool = option(False, "treat all classes as one, the model's too")
    verbose: bool = option(False, "per-class rows are always printed; accepted")
    save_hybrid: bool = option(False, "as --save-txt, the labels added before NMS")
    save_json: bool = option(False, "<weights>_predictions.json in COCO's results format")
    v5_metric: bool = option(False, "the line of the original's own metric as its --v5-metric has it")


OPTIONS = (ValOptions,)


@dataclass(frozen=True)
class _Settings:
    """How the split is measured: what was given, the rest as the run of the weights was told."""

    batch_size: int
    padding_group: int  # images that are padded to one shape
    image_size: int
    iou_thres: float
    amp: str


def run(options: ValOptions) -> int:
    """Measure, print, write the report; returns the exit code.

    Raises:
        UserError: weights and data do not fit together, or a flag is out of its bounds.
    """
    model, trained, settings, compute = _open_model(options)
    dataset, single = _open_data(options, trained, model)
    stride = size_grid(model)
    square = _square_side(model)
    size = square or round_up(settings.image_size, stride)
    split = "val" if options.task == "speed" else options.task
    measured = open_measured_split(
        dataset,
        split,
        image_size=size,
        batch_size=settings.batch_size,
        stride=stride,
        single_class=single,
        workers=options.workers,
        device=compute.device,
        padding_group=settings.padding_group,
        margin=0.0 if square else 0.5,
    )
    print("\n".join([*dataset.notes, *describe(split, measured.data)]))
    if not measured.data.tally.boxes:
        print(f"warning: {split}: not one label in {len(measured.data)} images: the mAP says nothing")
    folder = RunDir.create(options.project, options.name, options.exist_ok)
    speed = options.task == "speed"
    if isinstance(model, DetectionModel):
        model = model.to(compute.device).to(memory_format=torch.channels_last).eval()
    print(f"{compute.words}; {size} px, batch {settings.batch_size}, split {split}")
    outcome = validate(
        model,
        measured.loader.epoch(0),
        measured.evaluator,
        compute,
        conf_thres=SPEED_CONF if speed else options.conf_thres,
        iou_thres=SPEED_IOU if speed else settings.iou_thres,
        augment=options.augment,
        hybrid=options.save_hybrid,
        single_class=single,
        on_batch=None if speed else _Watcher(options, folder, measured.data.names),
    )
    each = {stage: 1000 * seconds / max(outcome.images, 1) for stage, seconds in outcome.seconds.items()}
    where = f"per image at batch {settings.batch_size}"
    print(f"Speed: {each['inference']:.1f} ms inference, {each['nms']:.1f} ms NMS {where}")
    if not speed:
        facts = {"data": str(dataset.path), "split": split, "device": compute.words}
        if isinstance(model, DetectionModel):
            facts |= model_facts(model, size)
        _report(options, measured, folder, {"weights": options.checkpoint, **facts})
    return 0


def _open_model(
    options: ValOptions,
) -> tuple[DetectionModel | ExportedModel, dict[str, Any], _Settings, Compute]:
    """The model, what the run of its weights was told, how it is measured, and what it computes on."""
    if runtime_of(options.checkpoint):  # its precision is the file's
        compute = select_compute(options.device, "off")
        return ExportedModel(options.checkpoint, str(compute.device)), {}, _as_trained(options, {}), compute
    content = read_checkpoint(options.checkpoint)
    trained = training_options(content)
    settings = _as_trained(options, trained)
    return (
        model_from_weights(options.checkpoint, content),
        trained,
        settings,
        select_compute(options.device, settings.amp),
    )


def _square_side(model: DetectionModel | ExportedModel) -> int:
    """The side, in px, of the square images that an exported file is made for; 0: it takes others."""
    size = model.facts.image_size if isinstance(model, ExportedModel) else None
    return size[0] if size and size[0] == size[1] else 0


def _open_data(
    options: ValOptions, trained: Mapping[str, Any], model: DetectionModel | ExportedModel
) -> tuple[DatasetConfig, bool]:
    """The data given, or those that the weights name; whether all classes are one. The model follows their names."""
    dataset = data_of(options.data, trained)
    single = options.single_cls or bool(trained.get("single_cls") and model.num_classes == 1)
    classes = len(dataset.class_names(single))
    if model.num_classes != classes and not single:
        raise UserError(f"{options.checkpoint}: {model.num_classes} classes, but {dataset.path} has {classes}")
    if isinstance(model, ExportedModel):
        if not single and sorted(model.names) == sorted(dataset.names) and model.names != list(dataset.names):
            words = f"its classes are {', '.join(model.names)}, in another order than those of {dataset.path}"
            raise UserError(f"{options.checkpoint}: {words}; measure the checkpoint, or give its own YAML")
    elif not single and (words := follow_names(model, model.names, dataset.names)):
        print(words)
    return dataset, single


def _report(options: ValOptions, measured: MeasuredSplit, folder: RunDir, facts: dict[str, str]) -> None:
    """Print the figures, write the report and what else was asked for."""
    result = measured.evaluator.compute()
    truth, found = measured.truth, measured.evaluator.detections()
    print(f"{per_class_table(result)}\n\n{result.summary_text}")
    if options.save_hybrid:
        print("\n--save-hybrid: the labels are among the detections, so these figures are no measurement of the model")
    print(_original_words(yolov7_evaluate(truth, found, v5_metric=options.v5_metric)))
    weights = Path(options.checkpoint)
    if options.save_json:
        folder.write(f"{weights.stem}_predictions.json", json.dumps(found))
    notes = write_report(
        folder.path,
        result,
        truth,
        found,
        title=f"{weights.name} on {Path(facts['data']).name}",
        facts=facts,
        read_image=measured.reader(),
    )
    print("\n".join([*notes, f"results in {folder.path}"]))


def _original_words(result: OriginalResult) -> str:
    return (
        f"\nFor comparison with logs of the original, its own metric: P {result.precision:.3f}, R {result.recall:.3f}, "
        f"mAP@.5 {result.map50:.3f}, mAP@.5:.95 {result.map50_95:.3f}"
    )


def _as_trained(options: ValOptions, trained: Mapping[str, Any]) -> _Settings:
    """What was given, and the rest so that the figures are the training's."""
    group = 2 * trained["batch_size"] if isinstance(trained.get("batch_size"), int) else 32  # as the trainer does
    if options.batch_size is not None and options.batch_size > group:
        print(f"--batch-size {options.batch_size} lowered to {group}: images are padded in groups as in the training")
    iou_thres = COMPAT_IOU_THRES if trained.get("compat") else IOU_THRES
    return _Settings(
        batch_size=min(options.batch_size or group, group),
        padding_group=group,
        image_size=options.img_size or (trained.get("img_size") or [0, 640])[1],
        iou_thres=iou_thres if options.iou_thres is None else options.iou_thres,
        amp=options.amp or {"off": "off", "bf16": "bf16"}.get(trained.get("amp", ""), "auto"),
    )


class _Watcher:
    """Sees each batch with its detections: draws the first ones, writes text files where they were asked for."""

    def __init__(self, options: ValOptions, folder: RunDir, names: Sequence[str]) -> None:
        self.pictures = RunPictures(folder.path, names)
        texts = options.save_txt or options.save_hybrid
        self.texts = _TextFiles(folder.path / "labels", options.save_conf) if texts else None

    def __call__(self, index: int, batch: Batch, found: list[torch.Tensor]) -> None:
        self.pictures.val_batch(index, batch, found)
        if self.texts:
            self.texts.write(batch, found)


class _TextFiles:
    """One YOLO txt per image: class cx cy w h [confidence], normalised by the original image, best detection last."""

    def __init__(self, folder: Path, with_confidence: bool) -> None:
        self.folder, self.with_confidence = folder, with_confidence
        self._free_stem = FreeNames()
        folder.mkdir(exist_ok=True)

    def write(self, batch: Batch, found: list[torch.Tensor]) -> None:
        _, detections = to_original(batch, found)
        for meta, rows in zip(batch.metas, detections, strict=True):
            lines = yolo_lines(rows, meta.original_hw, self.with_confidence)
            stem = self._free_stem(Path(meta.path).stem)
            (self.folder / f"{stem}.txt").write_text(lines, encoding="utf-8")
