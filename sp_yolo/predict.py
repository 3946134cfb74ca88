"""`sp-yolo predict`: detect on images, folders, globs, videos, streams and webcams (the original's detect.py)."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from sp_yolo.boxes import boxes_to_original, letterbox, non_max_suppression
from sp_yolo.data.images import ImageFault, read_image
from sp_yolo.data.sources import find_sources
from sp_yolo.engine.device import Compute, select_compute
from sp_yolo.engine.inputs import round_up, size_grid, to_input
from sp_yolo.engine.rundir import RunDir
from sp_yolo.errors import EnvironmentFault, StorageError, UserError
from sp_yolo.eval.pictures import class_color, draw_box
from sp_yolo.inference import add_inference_arguments, check_flags, yolo_lines
from sp_yolo.models import deploy, model_from_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_inference_arguments(parser, image_size=640, conf_thres=0.25, iou_thres=0.45, project="runs/detect")
    words = "images, folders, globs, videos, stream URLs, webcam numbers, or a .txt that lists such"
    parser.add_argument("--source", required=True, nargs="+", help=words)
    parser.add_argument("--view-img", action="store_true", help="show each image in a window (needs a desktop OpenCV)")
    parser.add_argument("--save-json", action="store_true", help="detections.json: boxes in original pixels")
    parser.add_argument("--nosave", action="store_true", help="write no pictures")
    parser.add_argument("--classes", type=int, nargs="+", help="only these classes")
    parser.add_argument("--agnostic-nms", action="store_true", help="a box suppresses those of other classes too")


class Detector:
    """A deployed model with its post-processing: image in, detections in original pixels out."""

    def __init__(
        self,
        weights: str,
        compute: Compute,
        *,
        image_size: int = 640,
        conf_thres: float = 0.25,
        iou_thres: float = 0.45,
        classes: list[int] | None = None,
        agnostic: bool = False,
        augment: bool = False,
    ) -> None:
        model = model_from_weights(weights)
        self.names, self.stride = model.names, size_grid(model)
        for label in classes or []:
            if not 0 <= label < len(self.names):
                raise UserError(f"--classes {label}: the model has classes 0..{len(self.names) - 1}")
        self.model = deploy(model).to(compute.device).to(memory_format=torch.channels_last).eval()
        self.compute, self.augment = compute, augment
        self.image_size = round_up(image_size, self.stride)
        self.nms: dict[str, Any] = {
            "conf_thres": conf_thres,
            "iou_thres": iou_thres,
            "classes": classes,
            "agnostic": agnostic,
        }

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> torch.Tensor:
        """uint8 [H, W, 3] BGR -> float32 [k, 6] x1, y1, x2, y2 (px of ``image``), score, class; best first."""
        padded, ratio, pads = letterbox(image, self.image_size, auto=True, stride=self.stride)
        chw = torch.from_numpy(np.ascontiguousarray(padded[..., ::-1].transpose(2, 0, 1)))[None]
        with self.compute.autocast():
            decoded, _ = self.model(to_input(chw, self.compute), augment=self.augment)
        rows = non_max_suppression(decoded, multi_label=False, **self.nms)[0].float().cpu()
        original = (image.shape[0], image.shape[1])
        boxes = boxes_to_original(rows[:, :4], padded.shape[:2], original, ((ratio, ratio), pads))
        return torch.cat((boxes.round(), rows[:, 4:]), 1)

    def draw(self, image: np.ndarray, rows: torch.Tensor) -> np.ndarray:
        """A copy of the BGR image with boxes, names and scores."""
        canvas = np.ascontiguousarray(image[..., ::-1])
        for *box, score, label in rows.flip(0).tolist():
            draw_box(canvas, np.array(box), class_color(int(label)), f"{self.names[int(label)]} {score:.2f}")
        return np.ascontiguousarray(canvas[..., ::-1])

    def describe(self, rows: torch.Tensor) -> str:
        """'2 RBC, 1 WBC', or 'nothing'."""
        counts = torch.bincount(rows[:, 5].long(), minlength=len(self.names)).tolist()
        return ", ".join(f"{count} {self.names[label]}" for label, count in enumerate(counts) if count) or "nothing"


def frames(source: str) -> Iterator[tuple[np.ndarray, float]]:
    """(BGR frame, frames per second) of a video file, stream or webcam.

    Raises:
        UserError: it cannot be opened.
    """
    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    if not capture.isOpened():
        raise UserError(f"--source {source}: cannot be opened as a video, stream or webcam")
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = rate if 0 < rate < 1000 else 25.0
    try:
        while True:
            read, frame = capture.read()
            if not read:
                return
            yield frame, rate
    finally:
        capture.release()


class _Output:
    """What is kept of the detections: pictures, videos, txt files, one JSON, and one printed line per image."""

    def __init__(self, arguments: argparse.Namespace, detector: Detector) -> None:
        self.arguments, self.detector = arguments, detector
        self.folder = RunDir.create(arguments.project, arguments.name, arguments.exist_ok)
        self.records: list[dict[str, Any]] = []
        self.stems: set[str] = set()
        self.video: cv2.VideoWriter | None = None

    def free_stem(self, stem: str) -> str:
        """``stem``, or with a number behind it: images of one name in several folders must not overwrite each other."""
        number, free = 1, stem
        while free in self.stems:
            number += 1
            free = f"{stem}_{number}"
        self.stems.add(free)
        return free

    def add(self, title: str, stem: str, image: np.ndarray, rows: torch.Tensor, seconds: float) -> np.ndarray:
        """Record one image or frame, print its line; returns the drawing."""
        size = f"{image.shape[1]}x{image.shape[0]}"
        print(f"{title}: {size}, {self.detector.describe(rows)}, {1000 * seconds:.1f} ms", flush=True)
        if self.arguments.save_txt:
            lines = yolo_lines(rows, (image.shape[0], image.shape[1]), self.arguments.save_conf)
            (self.folder.path / "labels").mkdir(exist_ok=True)
            self.folder.write(f"labels/{stem}.txt", lines)
        found = [
            {"class": int(label), "name": self.detector.names[int(label)], "score": score, "box_xyxy": box}
            for *box, score, label in rows.tolist()
        ]
        self.records.append({"image": title, "detections": found})
        drawing = self.detector.draw(image, rows)
        if self.arguments.view_img:
            _show(drawing)
        return drawing

    def picture(self, name: str, drawing: np.ndarray) -> None:
        """Write a drawing in the format of its name; as JPEG where OpenCV only reads that or the name says nothing."""
        if self.arguments.nosave:
            return
        path = self.folder.path / name
        content = _encoded(path.suffix, drawing)
        if content is None:
            path, content = path.with_suffix(".jpg"), _encoded(".jpg", drawing)
        if content is None:
            raise StorageError(f"{path}: picture cannot be written")
        self.folder.write(path.name, content)  # cv2.imwrite takes no path with odd letters on Windows

    def frame(self, name: str, drawing: np.ndarray, rate: float) -> None:
        if self.arguments.nosave:
            return
        if self.video is None:
            size = (drawing.shape[1], drawing.shape[0])
            path = self.folder.path / name
            self.video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
            if not self.video.isOpened():
                raise StorageError(f"{path}: video cannot be written")
        self.video.write(drawing)

    def end_video(self) -> None:
        if self.video is not None:
            self.video.release()
            self.video = None

    def close(self) -> None:
        if self.arguments.save_json:
            self.folder.write("detections.json", json.dumps(self.records))
        print(f"results in {self.folder.path}")


def _encoded(suffix: str, drawing: np.ndarray) -> bytes | None:
    try:
        written, content = cv2.imencode(suffix, drawing)
    except cv2.error:
        return None
    return content.tobytes() if written else None


def _show(drawing: np.ndarray) -> None:
    try:
        cv2.imshow("sp-yolo", drawing)
        cv2.waitKey(1)
    except cv2.error:
        raise EnvironmentFault("--view-img: this OpenCV has no windows (pip install opencv-python)") from None


def run(arguments: argparse.Namespace) -> int:
    """Detect on every source; returns the exit code.

    Raises:
        UserError: the source or a flag is wrong. StorageError: a result cannot be written.
    """
    check_flags(arguments)
    compute = select_compute(arguments.device, "auto")
    images, videos = find_sources(arguments.source)
    detector = Detector(
        arguments.weights,
        compute,
        image_size=arguments.img_size,
        conf_thres=arguments.conf_thres,
        iou_thres=arguments.iou_thres,
        classes=arguments.classes,
        agnostic=arguments.agnostic_nms,
        augment=arguments.augment,
    )
    output = _Output(arguments, detector)
    try:
        for path in images:
            try:
                image = read_image(path)
            except ImageFault as fault:
                print(f"{path}: skipped: {fault}")
                continue
            rows, seconds = _timed(detector, image)
            stem = output.free_stem(path.stem)
            output.picture(f"{stem}{path.suffix}", output.add(str(path), stem, image, rows, seconds))
        for source in videos:
            stem = output.free_stem(f"webcam{source}" if source.isdecimal() else Path(source.split("://")[-1]).stem)
            for number, (image, rate) in enumerate(frames(source)):
                rows, seconds = _timed(detector, image)
                drawing = output.add(f"{source} frame {number}", f"{stem}_{number}", image, rows, seconds)
                output.frame(f"{stem}.mp4", drawing, rate)
            output.end_video()
    finally:
        output.end_video()
        output.close()
    return 0


def _timed(detector: Detector, image: np.ndarray) -> tuple[torch.Tensor, float]:
    started = time.perf_counter()
    return detector(image), time.perf_counter() - started
