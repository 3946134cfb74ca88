"""What would silently ruin a training run, found before it starts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sp_yolo.config import SPLITS, DatasetConfig, load_config
from sp_yolo.data import DetectionDataset
from sp_yolo.data.images import ImageFault, read_image
from sp_yolo.data.statistics import box_sides, class_counts
from sp_yolo.engine.autoanchor import GOOD_RECALL, anchor_fit
from sp_yolo.engine.model import build_detector
from sp_yolo.engine.plan import complete
from sp_yolo.engine.review import describe, losses, review
from sp_yolo.engine.splits import open_dataset
from sp_yolo.errors import EnvironmentFault, StorageError, UserError
from sp_yolo.report.check_page import write_check_page
from sp_yolo.report.pictures import draw_mosaic
from sp_yolo.report.plots import draw_label_statistics
from sp_yolo.runtime.words import bar_switch

ANCHOR_THRESHOLD = 4.0  # anchor_t of every recipe
SAMPLES = 16


@dataclass
class Findings:
    """`errors` keep training from starting or reaching its end; `warnings` make its result worse than it looks."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, split: str, fault: str) -> None:
        """What cannot be read in a split: an error, but not in `test`, of which training has no need."""
        if split == "test":
            self.warnings.append(f"{fault}: `val --task test` would stop at it")
        else:
            self.errors.append(f"{fault}: training would stop at it")


def check_data(data: str, *, cfg: str, weights: str, image_size: int, accepted: bool, folder: Path) -> Findings:
    """Print what was found, write its pictures and check.html into ``folder``.

    ``cfg``, ``weights``: of the model that is to be trained; ``accepted``: what is lost is no error.

    Raises:
        UserError: the dataset YAML itself is wrong. StorageError: a picture cannot be written.
    """
    dataset = open_dataset(data)
    print("\n".join(dataset.notes), end="\n" if dataset.notes else "")
    findings = Findings()
    splits = open_splits(dataset, image_size, findings, accepted=accepted)
    check_files(splits, findings)
    print(class_table(dataset.names, splits))
    findings.warnings += review(splits, image_size)
    check_model(cfg, weights, dataset, splits.get("train"), image_size, findings)
    lines = draw(splits, dataset.names, folder)
    lines += [f"warning: {line}" for line in findings.warnings] + [f"error: {line}" for line in findings.errors]
    verdict = "training would not run" if findings.errors else "training would run"
    verdict = f"{dataset.path}: {len(findings.errors)} errors, {len(findings.warnings)} warnings: {verdict}"
    write_check_page(folder / "check.html", verdict, splits, dataset.names, findings.errors, findings.warnings)
    print("\n".join([*lines, f"all of it on one page: {folder / 'check.html'}", verdict]))
    return findings


def open_splits(
    config: DatasetConfig, image_size: int, findings: Findings, *, accepted: bool
) -> dict[str, DetectionDataset]:
    """Every split of the data that can be used; what is wrong with labels and missing images goes to `findings`.

    Losses at which training would stop are errors unless they are `accepted`.
    """
    splits = {}
    if not config.train:
        findings.errors.append(f"{config.path}: no 'train' split is given")
    for split in SPLITS:
        if not getattr(config, split):
            continue
        try:
            splits[split] = DetectionDataset(config, split, image_size)
        except UserError as error:
            findings.add(split, str(error))
            continue
        first, *lines = describe(split, splits[split])
        print(first)
        findings.warnings += [line.removeprefix("warning: ") for line in lines]
        lost = losses(split, splits[split]) if split != "test" else []
        if accepted:
            findings.warnings += lost
        else:
            findings.errors += [f"{line} (--accept-losses trains on the rest)" for line in lost]
    return splits


def check_files(splits: dict[str, DetectionDataset], findings: Findings) -> None:
    """Decode every image, and find the same file in two splits."""
    home: dict[bytes, tuple[str, str]] = {}
    shared: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for split, dataset in splits.items():
        paths = [dataset.path(index) for index in range(len(dataset))]
        for path, digest, fault in tqdm(_examine(paths), total=len(paths), desc=f"{split} images", **bar_switch(None)):
            if fault:
                findings.add(split, f"{path}: {fault}")
                continue
            first_split, first_path = home.setdefault(digest, (split, path))
            if first_path != path:
                shared.setdefault((first_split, split), []).append((first_path, path))
    for (first, second), pairs in shared.items():
        where = f"twice in {first}" if first == second else f"both in {first} and in {second}"
        example = " = ".join(pairs[0])
        findings.warnings.append(
            f"{len(pairs)} {'images are' if len(pairs) > 1 else 'image is'} {where}, e.g. {example}"
        )


def _examine(paths: list[str]) -> Iterator[tuple[str, bytes, str]]:
    """(path, digest of the bytes, fault in words or '') per image, in order."""

    def one(path: str) -> tuple[str, bytes, str]:
        try:
            read_image(path)
            return path, hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest(), ""
        except (ImageFault, OSError) as fault:
            return path, b"", str(fault)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from pool.map(one, paths)


def class_table(names: tuple[str, ...], splits: dict[str, DetectionDataset]) -> str:
    """Images and boxes per class and split, as text."""
    header = f"{'Class':>20}" + "".join(f"{split + ' images':>14}{split + ' boxes':>14}" for split in splits)
    counts = {split: class_counts(dataset) for split, dataset in splits.items()}
    lines = [header]
    for number, name in enumerate(names):
        cells = "".join(f"{count:14d}" for split in splits for count in counts[split][:, number])
        lines.append(f"{name[:20]:>20}{cells}")
    return "\n".join(lines)


def check_model(
    cfg: str, weights: str, data: DatasetConfig, train: DetectionDataset | None, image_size: int, findings: Findings
) -> None:
    """Does the model build, do the weights fit it and the data's classes (as training builds it), do its anchors fit
    the boxes."""

    def say(line: str) -> None:
        if line.startswith("warning: "):
            findings.warnings.append(line.removeprefix("warning: "))
        elif line:
            print(line)

    try:
        config = complete(load_config(cfg=cfg, weights=weights), data)
        model, _ = build_detector(config, config, data, single_class=False, say=say)
    except UserError as error:
        findings.errors.append(str(error))
        return
    sides = box_sides(train, image_size) if train else np.zeros((0, 2))
    sides = sides[(sides > 0).all(axis=1)]
    if not len(sides):
        return
    anchors = model.head.anchor_grid.detach().double().numpy().reshape(-1, 2)
    fit = anchor_fit(sides, anchors, ANCHOR_THRESHOLD)
    print(f"anchors: best possible recall {fit.bpr:.4f}, {fit.above:.2f} anchors above threshold per box")
    if fit.bpr < GOOD_RECALL:
        findings.warnings.append(
            f"the anchors can answer for {fit.bpr:.1%} of the boxes at --img-size {image_size}: "
            "training will refit them (do not give --noautoanchor)"
        )


def draw(splits: dict[str, DetectionDataset], names: tuple[str, ...], folder: Path) -> list[str]:
    """Write labels_SPLIT.jpg (16 images spread over the split), labels_SPLIT.png (statistics); returns lines to say."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--output {folder}: cannot be made: {error.strerror}") from None
    lines = []
    for split, dataset in splits.items():
        images, boxes, titles = _samples(dataset)
        if not images:
            continue
        draw_mosaic(np.stack(images), boxes, names, folder / f"labels_{split}.jpg", titles=titles)
        lines.append(f"label samples: {folder / f'labels_{split}.jpg'}")
        try:
            labels = np.concatenate([np.zeros((0, 5)), *dataset.labels])
            draw_label_statistics(labels, names, folder / f"labels_{split}.png")
            lines.append(f"label statistics: {folder / f'labels_{split}.png'}")
        except EnvironmentFault as missing:
            lines.append(str(missing))
    return lines


def _samples(dataset: DetectionDataset) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """Images [3, H, W], boxes [k, 5] x1, y1, x2, y2 px, class, and names, evenly spread over the split."""
    images, boxes, titles = [], [], []
    for index in np.unique(np.linspace(0, len(dataset) - 1, SAMPLES).astype(int)).tolist():
        try:
            item = dataset.item(index)
        except UserError:
            continue  # an error already, by check_files
        height, width = item.image.shape[:2]
        centre, half = item.labels[:, 1:3], item.labels[:, 3:5] / 2
        corners = np.concatenate((centre - half, centre + half), axis=1) * [width, height, width, height]
        images.append(item.image.transpose(2, 0, 1))
        boxes.append(np.concatenate((corners, item.labels[:, :1]), axis=1))
        titles.append(item.meta.path)
    return images, boxes, titles
