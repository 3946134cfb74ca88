"""`sp-yolo predict`: detect on images, folders, globs, videos, streams and webcams (the original's detect.py)."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sp_yolo.commands.inference import SHARE, DeviceOptions, FreeNames, InferenceOptions, OutputOptions, yolo_lines
from sp_yolo.config import REQUIRED, Rule, option
from sp_yolo.data.images import ImageFault, read_image
from sp_yolo.data.sources import find_sources
from sp_yolo.detections import Detections
from sp_yolo.detector import Detector
from sp_yolo.errors import EnvironmentFault, StorageError, UserError
from sp_yolo.runtime.device import select_compute
from sp_yolo.runtime.folder import RunDir

EXAMPLES = """
  {prog} --weights best.pt --source photos/
  {prog} --weights best.pt --source video.mp4 --vid-stride 5 --region 0 200 1280 720
  {prog} --weights best.pt --source 0 --view-img --nosave
"""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(InferenceOptions, OutputOptions, DeviceOptions):
    """Detecting."""

    img_size: int = option(640, "px", "--img-size", "--img", "--imgsz", rule=Rule(1, 8192))
    iou_thres: float = option(0.45, "of NMS", "--iou-thres", "--iou", rule=SHARE)
    project: str = option("runs/detect", "folder of run directories")
    source: tuple[str, ...] = option(
        REQUIRED, "images, folders, globs, videos, stream URLs, webcam numbers, or a .txt that lists such"
    )
    view_img: bool = option(False, "show each image in a window (needs a desktop OpenCV)")
    save_json: bool = option(False, "detections.json: boxes in original pixels")
    nosave: bool = option(False, "write no pictures")
    classes: tuple[int, ...] | None = option(None, "only the classes of these numbers, counted from 0")
    agnostic_nms: bool = option(False, "a box suppresses those of other classes too")
    batch_size: int = option(
        8,
        "images that the network sees at once, of one shape; of a stream 1",
        "--batch-size",
        "--batch",
        rule=Rule(1, 65536),
    )
    vid_stride: int = option(1, "of a video every Nth frame", rule=Rule(1), metavar="N")
    region: tuple[int, ...] | None = option(
        None, "of a video only this part: x1 y1 x2 y2 in px of its frames", rule=Rule(0, 65536), metavar="PX"
    )


OPTIONS = (PredictOptions,)


@dataclass(frozen=True)
class _Shot:
    """An image or frame to detect on. ``corner``: of the part ``seen`` in the whole ``image``, px; ``keep``: writes
    the drawing."""

    title: str
    stem: str
    image: np.ndarray
    seen: np.ndarray
    corner: tuple[int, int]
    keep: Callable[[np.ndarray], None]


def frames(source: str, stride: int = 1) -> Iterator[tuple[int, np.ndarray, float]]:
    """(number, BGR frame, frames per second) of every ``stride``-th frame of a video file, stream or webcam.

    Raises:
        UserError: it cannot be opened.
    """
    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    if not capture.isOpened():
        raise UserError(f"--source {source}: cannot be opened as a video, stream or webcam")
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = (rate if 0 < rate < 1000 else 25.0) / stride
    try:
        for number in itertools.count():
            if number % stride:  # a frame that is only grabbed is not converted
                if not capture.grab():
                    return
                continue
            read, frame = capture.read()
            if not read:
                return
            yield number, frame, rate
    finally:
        capture.release()


class _Output:
    """What is kept of the detections: pictures, videos, txt files, one JSON, and one printed line per image."""

    def __init__(self, options: PredictOptions, detector: Detector) -> None:
        self.options, self.detector = options, detector
        self.folder = RunDir.create(options.project, options.name, options.exist_ok)
        self.records: list[dict[str, Any]] = []
        self.free_stem = FreeNames()
        self.video: cv2.VideoWriter | None = None

    def add(self, title: str, stem: str, image: np.ndarray, found: Detections, seconds: float) -> np.ndarray:
        """Record one image or frame, print its line; returns the drawing."""
        size = f"{image.shape[1]}x{image.shape[0]}"
        print(f"{title}: {size}, {found}, {1000 * seconds:.1f} ms", flush=True)
        if self.options.save_txt:
            lines = yolo_lines(found.to_tensor(), (image.shape[0], image.shape[1]), self.options.save_conf)
            (self.folder.path / "labels").mkdir(exist_ok=True)
            self.folder.write(f"labels/{stem}.txt", lines)
        entries = [
            {"class": label, "name": name, "score": score, "box_xyxy": list(box)} for box, score, label, name in found
        ]
        self.records.append({"image": title, "detections": entries})
        drawing = self.detector.draw(image, found)
        if self.options.view_img:
            _show(drawing)
        return drawing

    def picture(self, name: str, drawing: np.ndarray) -> None:
        """Write a drawing in the format of its name; as JPEG where OpenCV only reads that or the name says nothing."""
        if self.options.nosave:
            return
        path = self.folder.path / name
        content = _encoded(path.suffix, drawing)
        if content is None:
            path, content = path.with_suffix(".jpg"), _encoded(".jpg", drawing)
        if content is None:
            raise StorageError(f"{path}: picture cannot be written")
        self.folder.write(path.name, content)  # cv2.imwrite takes no path with odd letters on Windows

    def frame(self, name: str, drawing: np.ndarray, rate: float) -> None:
        if self.options.nosave:
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
        if self.options.save_json:
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


def run(options: PredictOptions) -> int:
    """Detect on every source; returns the exit code.

    Raises:
        UserError: the source or a flag is wrong. StorageError: a result cannot be written.
    """
    _check_region(options.region)
    compute = select_compute(options.device, "auto")
    images, videos = find_sources(options.source)
    detector = Detector(
        options.checkpoint,
        compute,
        image_size=options.img_size,
        conf_thres=options.conf_thres,
        iou_thres=options.iou_thres,
        classes=options.classes,
        agnostic=options.agnostic_nms,
        augment=options.augment,
        batch_size=options.batch_size,
    )
    output = _Output(options, detector)
    try:
        _detect(detector, output, _stills(images, output), options.batch_size)
        for source in videos:
            live = source.isdecimal() or "://" in source  # whose frames are not made to wait for others
            _detect(detector, output, _moving(source, output, options), 1 if live else options.batch_size)
            output.end_video()
    finally:
        output.end_video()
        output.close()
    return 0


def _check_region(region: tuple[int, ...] | None) -> None:
    if region and (len(region) != 4 or region[0] >= region[2] or region[1] >= region[3]):
        raise UserError(f"--region {' '.join(map(str, region))}: must be x1 y1 x2 y2 with x1 < x2 and y1 < y2")


def _detect(detector: Detector, output: _Output, shots: Iterable[_Shot], batch_size: int) -> None:
    shots = iter(shots)
    while batch := list(itertools.islice(shots, batch_size)):
        started = time.perf_counter()
        found = detector([shot.seen for shot in batch])
        seconds = (time.perf_counter() - started) / len(batch)
        for shot, each in zip(batch, found, strict=True):
            shot.keep(output.add(shot.title, shot.stem, shot.image, each.moved(*shot.corner), seconds))


def _stills(images: Iterable[Path], output: _Output) -> Iterator[_Shot]:
    """The image files that can be read; a line for each that cannot."""
    for path in images:
        try:
            image = read_image(path)
        except ImageFault as fault:
            print(f"{path}: skipped: {fault}")
            continue
        stem = output.free_stem(path.stem)
        keep = functools.partial(output.picture, f"{stem}{path.suffix}")
        yield _Shot(str(path), stem, image, image, (0, 0), keep)


def _moving(source: str, output: _Output, options: PredictOptions) -> Iterator[_Shot]:
    """The frames of a video, stream or webcam that are asked for.

    Raises:
        UserError: it cannot be opened, or --region lies outside it.
    """
    stem = output.free_stem(f"webcam{source}" if source.isdecimal() else Path(source.split("://")[-1]).stem)
    for number, image, rate in frames(source, options.vid_stride):
        x1, y1, x2, y2 = options.region or (0, 0, image.shape[1], image.shape[0])
        seen = image[y1:y2, x1:x2]
        if not seen.size:
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise UserError(f"--region {x1} {y1} {x2} {y2}: outside the frames of {source}, which are {size}")
        keep = functools.partial(output.frame, f"{stem}.mp4", rate=rate)
        yield _Shot(f"{source} frame {number}", f"{stem}_{number}", image, seen, (x1, y1), keep)
