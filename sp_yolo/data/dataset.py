"""Index -> training or validation item; every random draw is folded from (seed, epoch, index, repeat)."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np

from sp_yolo.boxes import cxcywh_to_xyxy, letterbox, xyxy_to_cxcywh
from sp_yolo.config import AugmentRecipe, DatasetConfig
from sp_yolo.data import augment as augmentation
from sp_yolo.data.augment import Sample
from sp_yolo.data.cache import Load, MemoryCache, open_cache
from sp_yolo.data.canvas import Tile, painted
from sp_yolo.data.hook import AugmentHook, apply_hook
from sp_yolo.data.images import ImageFault, read_image
from sp_yolo.data.index import scan
from sp_yolo.data.labels.annotation import CROWD
from sp_yolo.data.paste import collect_crops, copy_paste, draw_copy_paste, paste_in
from sp_yolo.data.sketch import Sketch
from sp_yolo.errors import UserError


@dataclass(frozen=True, slots=True)
class SampleMeta:
    """Where an item comes from: ``ratio_pad`` = ((ratio_h, ratio_w), (pad_w, pad_h)) as ``boxes_to_original`` takes."""

    index: int
    image_id: int
    path: str
    original_hw: tuple[int, int]
    ratio_pad: tuple[tuple[float, float], tuple[float, float]]


class Item(NamedTuple):
    """``image`` uint8 [H, W, 3] RGB, or its Sketch; ``labels`` float32 [n, 5] class and normalised cx, cy, w, h."""

    image: Any
    labels: np.ndarray
    meta: SampleMeta


class DetectionDataset:
    """One split of a dataset, ready to be trained on (``augment``) or evaluated.

    ``image_size`` px is the longer side of an image. ``rect`` groups images of similar shape into batches of
    ``batch_size``, each padded to multiples of ``stride`` (plus ``pad`` strides). ``cache_images``:
    False, or what :func:`sp_yolo.data.cache.open_cache` takes; ``processes`` on this machine keep images of their own.
    ``augment``: the recipe's part; without one nothing is drawn. With one, large JPEGs are decoded at reduced size,
    but with ``compat``. ``sketches``: training items hold sketches, of which ``compose`` makes the pixels.
    ``mosaic_epochs``: from this epoch on there is no mosaic and no mixup; ``hook`` has the last word on a sample.

    ``labels``: list of float32 [n, 5]; ``shapes_wh``: [n, 2] px; ``category_ids``: class index -> category id of
    ``ground_truth()``; ``warnings``: one line per faulty file; ``tally``: what was found and dropped, ``counts`` the
    same in one counter; ``crowds``: how many of a class; ``batch_indices``: the groups of a rect dataset, else None;
    ``cache_note``: what was cached, in one line; ``in_memory``: whether every image is.

    Raises:
        UserError: see ``index.scan``; later, an image that has become unreadable.
    """

    def __init__(
        self,
        config: DatasetConfig,
        split: str,
        image_size: int,
        *,
        augment: AugmentRecipe | None = None,
        rect: bool = False,
        batch_size: int = 16,
        stride: int = 32,
        pad: float = 0.0,
        seed: int = 0,
        single_class: bool = False,
        cache_images: bool | str = False,
        compat: bool = False,
        processes: int = 1,
        sketches: bool = False,
        mosaic_epochs: int | None = None,
        hook: AugmentHook | None = None,
    ) -> None:
        found = scan(config, split, single_class=single_class, compat=compat)
        self.image_size, self.seed, self.augment, self.rect = image_size, seed, augment, rect
        self.names = config.class_names(single_class)
        self.category_ids, self.warnings, self.counts = found.category_ids, found.warnings, found.counts
        self.tally, self.crowds = found.tally, found.crowds
        self._entries = found.entries
        self.batch_indices: list[np.ndarray] | None = None
        self._input_hw = [(image_size, image_size)] * len(self._entries)
        if rect:
            self._plan_rect(batch_size, stride, pad)
        self.labels = [entry.labels for entry in self._entries]
        self.shapes_wh = np.array([entry.size_wh for entry in self._entries], np.int64)
        self._mosaic_epochs, self._hook = mosaic_epochs, hook
        self._render: augmentation.Render = Sketch.warped if sketches else augmentation.warp_pixels
        # A measurement keeps every pixel, and --compat those of the original.
        self._reduces = augment is not None and not compat
        self._has_segments = any(entry.segments is not None for entry in self._entries)
        self._read: Load = self._read_resized
        self.cache_note, self.in_memory = "", False
        if cache_images:
            self._use_cache(config, cache_images, processes)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Item:
        return self.item(index)

    def path(self, index: int) -> str:
        return self._entries[index].path

    @property
    def paths(self) -> list[str]:
        return [entry.path for entry in self._entries]

    def item(self, index: int, epoch: int = 0, repeat: int = 0) -> Item:
        """One item; ``repeat`` tells apart the draws of an image that an epoch shows more than once."""
        entry = self._entries[index]
        if self.augment is not None:
            # the order of the fold is part of what a resumed run relies on
            rng = np.random.default_rng((self.seed, epoch, index, repeat))
            closed = self._mosaic_epochs is not None and epoch >= self._mosaic_epochs
            recipe = replace(self.augment, mosaic=0.0) if closed else self.augment
            sample, ratio_pad = self._training_sample(index, recipe, rng)
            if self._hook is not None:
                sample = apply_hook(self._hook, sample, rng, len(self.names), entry.path)
        else:
            sample, ratio_pad = self._letterboxed(index)
        height, width = sample.image.shape[:2]
        centre_wh = xyxy_to_cxcywh(sample.boxes_xyxy) / np.array([width, height, width, height], np.float32)
        labels = np.concatenate((sample.classes[:, None], centre_wh), 1).astype(np.float32)
        image = sample.image
        if not isinstance(image, Sketch):
            image = cv2.cvtColor(painted(image), cv2.COLOR_BGR2RGB)
        original_hw = (entry.size_wh[1], entry.size_wh[0])
        return Item(image, labels, SampleMeta(index, entry.image_id, entry.path, original_hw, ratio_pad))

    def ground_truth(self) -> dict[str, Any]:
        """The split as a COCO dict with integer ids, in original pixels.

        Crowds and difficult objects have ignore = 1. Only a crowd has iscrowd = 1, which excuses any number of
        detections on it; a difficult object excuses one.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for entry in self._entries:
            width, height = entry.size_wh
            name = os.path.basename(entry.path)
            images.append({"id": entry.image_id, "file_name": name, "width": width, "height": height})
            for row in _truth_rows(entry.labels, width, height) if entry.truth is None else entry.truth:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": entry.image_id,
                        "category_id": self.category_ids[int(row[0])],
                        "bbox": [float(value) for value in row[1:5]],
                        "area": float(row[5]),
                        "iscrowd": int(row[6] == CROWD),
                        "ignore": int(row[6] > 0),
                    }
                )
        pairs = zip(self.category_ids, self.names, strict=True)
        categories = [{"id": identifier, "name": name} for identifier, name in pairs]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    # ------------------------------------------------------------------------------------------------------- set-up
    def _plan_rect(self, batch_size: int, stride: int, pad: float) -> None:
        """Sort by aspect ratio h/w and give each batch its own shape."""
        aspects = np.array([entry.size_wh[1] / entry.size_wh[0] for entry in self._entries])
        order = np.argsort(aspects, kind="stable")
        self._entries = [self._entries[position] for position in order]
        aspects = aspects[order]
        starts = range(0, len(aspects), batch_size)
        self.batch_indices = [np.arange(start, min(start + batch_size, len(aspects))) for start in starts]
        for batch in self.batch_indices:
            low, high = aspects[batch[0]], aspects[batch[-1]]
            shape = np.array([high, 1.0]) if high < 1 else np.array([1.0, 1 / low]) if low > 1 else np.ones(2)
            height, width = np.ceil(shape * self.image_size / stride + pad).astype(int) * stride
            for position in batch:
                self._input_hw[position] = (int(height), int(width))

    def _use_cache(self, config: DatasetConfig, kind: bool | str, processes: int) -> None:
        sizes_wh = np.array([self._resized_wh(entry.size_wh) for entry in self._entries], np.int64)
        trained = self.augment is not None
        cache = open_cache(
            kind,
            self._read_resized,
            self.paths,
            sizes_wh,
            config.root,
            f"{self.image_size}|{trained}|{self._reduces}",
            processes=processes,
            often=trained,
        )
        if isinstance(cache, str):
            self.cache_note = cache
            return
        self.in_memory = isinstance(cache, MemoryCache) and cache.complete
        self._read, self.cache_note = cache, cache.note

    # ---------------------------------------------------------------------------------------------------- one image
    def _resized_wh(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        ratio = self.image_size / max(size_wh)
        return max(int(size_wh[0] * ratio), 1), max(int(size_wh[1] * ratio), 1)

    def _read_resized(self, index: int) -> np.ndarray:
        """BGR pixels, longer side = image_size."""
        entry = self._entries[index]
        try:
            image = read_image(entry.path, self.image_size if self._reduces else 0)
        except ImageFault as fault:
            raise UserError(f"{entry.path}: {fault} (it was readable when training began)") from None
        wanted_wh = self._resized_wh(entry.size_wh)
        if image.shape[1::-1] == wanted_wh:
            return image
        shrinks = self.image_size < max(entry.size_wh)
        method = cv2.INTER_AREA if shrinks and self.augment is None else cv2.INTER_LINEAR
        return cv2.resize(image, wanted_wh, interpolation=method)

    def _tile(self, index: int) -> Sample:
        """An image with its labels in px of the resized picture."""
        entry = self._entries[index]
        width, height = self._resized_wh(entry.size_wh)
        scale = np.array([width, height, width, height], np.float32)
        boxes = cxcywh_to_xyxy(entry.labels[:, 1:] * scale)
        segments = None if entry.segments is None else [segment * scale[:2] for segment in entry.segments]
        tile = Tile((width, height), functools.partial(self._read, index))
        return Sample(tile, entry.labels[:, 0], boxes, segments)

    def _letterboxed(self, index: int) -> tuple[Sample, tuple[tuple[float, float], tuple[float, float]]]:
        width, height = self._entries[index].size_wh
        tile = self._tile(index)
        resized_h, resized_w = tile.image.shape[:2]
        image, ratio, pad_wh = letterbox(painted(tile.image), self._input_hw[index], scale_up=self.augment is not None)
        boxes = tile.boxes_xyxy * np.float32(ratio) + np.array([*pad_wh, *pad_wh], np.float32)
        ratio_pad = ((resized_h / height * ratio, resized_w / width * ratio), pad_wh)
        return Sample(image, tile.classes, boxes), ratio_pad

    # ---------------------------------------------------------------------------------------------------- augmenting
    def _training_sample(
        self, index: int, recipe: AugmentRecipe, rng: np.random.Generator
    ) -> tuple[Sample, tuple[tuple[float, float], tuple[float, float]]]:
        """Mosaic and mixup or one warped image, then colour, pasting and flips."""
        ratio_pad = ((1.0, 1.0), (0.0, 0.0))
        if not self.rect and rng.random() < recipe.mosaic:
            sample = self._mosaic(index, recipe, rng)
            if rng.random() < recipe.mixup:
                second = self._mosaic(int(rng.integers(len(self))), recipe, rng)
                sample = augmentation.mixup(sample, second, float(rng.beta(8, 8)))
        else:
            sample, ratio_pad = self._letterboxed(index)
            sample = augmentation.warp(sample, augmentation.draw_warp(rng, recipe), render=self._render)
        sample = replace(sample, image=augmentation.hsv(sample.image, augmentation.draw_hsv(rng, recipe)))
        if self._has_segments and rng.random() < recipe.paste_in:
            crops = collect_crops(lambda: self._raw_mosaic(int(rng.integers(len(self))), 4, rng), rng)
            sample = paste_in(sample, crops, rng)
        up_down, left_right = rng.random(2) < (recipe.flipud, recipe.fliplr)
        return augmentation.flip(sample, bool(up_down), bool(left_right)), ratio_pad

    def _mosaic(self, index: int, recipe: AugmentRecipe, rng: np.random.Generator) -> Sample:
        """Four tiles in 80 % of the cases, else nine; then copy_paste and the warp to image_size squared."""
        sample = self._raw_mosaic(index, 4 if rng.random() < 0.8 else 9, rng)
        sample = copy_paste(sample, draw_copy_paste(rng, sample, recipe.copy_paste))
        border = -self.image_size // 2
        return augmentation.warp(sample, augmentation.draw_warp(rng, recipe), (border, border), self._render)

    def _raw_mosaic(self, index: int, count: int, rng: np.random.Generator) -> Sample:
        """The mosaic of an image and random partners, 2s x 2s."""
        indices = [index, *map(int, rng.integers(0, len(self), count - 1))]
        tiles = [self._tile(each) for each in indices]
        if count == 4:
            return augmentation.mosaic4(tiles, self.image_size, augmentation.draw_mosaic4(rng, self.image_size))
        return augmentation.mosaic9(tiles, self.image_size, augmentation.draw_mosaic9(rng, self.image_size))


def _truth_rows(labels: np.ndarray, width: int, height: int) -> np.ndarray:
    """[n, 7] class, x, y, w, h, area px, ignore, from normalised labels."""
    sizes = labels[:, 3:].astype(np.float64) * (width, height)
    corners = labels[:, 1:3].astype(np.float64) * (width, height) - sizes / 2
    return np.concatenate((labels[:, :1], corners, sizes, sizes.prod(1, keepdims=True), np.zeros((len(labels), 1))), 1)
