"""A function of the user's own changes training samples; what it may not do is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sp_yolo.config import AugmentRecipe, load_dataset_config
from sp_yolo.data import DetectionDataset
from sp_yolo.data.hook import find_hook
from sp_yolo.errors import UserError

STILL = AugmentRecipe(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0)


def dataset(toy_yaml: Path, hook: Any, recipe: AugmentRecipe = STILL, **more: Any) -> DetectionDataset:
    return DetectionDataset(load_dataset_config(str(toy_yaml)), "train", 64, augment=recipe, hook=hook, **more)


def mirror(image: Any, boxes: Any, classes: Any, rng: np.random.Generator) -> Any:
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3) and boxes.shape == (len(classes), 4)
    return image[:, ::-1], np.stack((64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]), 1), classes


def test_it_changes_pixels_and_boxes(toy_yaml: Path) -> None:
    plain, mirrored = dataset(toy_yaml, None)[3], dataset(toy_yaml, mirror)[3]
    assert len(plain.labels) and np.array_equal(plain.image[:, ::-1], mirrored.image)
    wanted = plain.labels * [1, -1, 1, 1, 1] + [0, 1, 0, 0, 0]
    np.testing.assert_allclose(mirrored.labels, wanted, atol=1e-6)


def test_boxes_are_cut_and_empty_ones_dropped(toy_yaml: Path) -> None:
    def own(image: Any, boxes: Any, classes: Any, rng: Any) -> Any:
        return image, [[-10, 8, 32, 80], [70, 0, 90, 9]], [1, 2]

    labels = dataset(toy_yaml, own)[0].labels
    np.testing.assert_allclose(labels, [[1, 0.25, 0.5625, 0.5, 0.875]], atol=1e-6)


def test_its_generator_is_the_samples_own(toy_yaml: Path) -> None:
    drawn: list[float] = []

    def own(image: Any, boxes: Any, classes: Any, rng: np.random.Generator) -> Any:
        drawn.append(rng.random())
        return image, boxes, classes

    data = dataset(toy_yaml, own)
    for key in ((1, 0), (1, 0), (1, 1), (2, 0)):
        data.item(*key)
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            lambda image, boxes, classes: (image[:8], boxes, classes),
            r"\[8, 64, 3\], must be uint8 \[64, 64, 3\]",
        ),
        (lambda image, boxes, classes: (image / 255, boxes, classes), "gave float64"),
        (lambda image, boxes, classes: (image, boxes, classes[:0]), "boxes and 0 classes"),
        (lambda image, boxes, classes: (image, boxes, classes + 90), r"a class outside 0\.\.5"),
        (lambda image, boxes, classes: (image, boxes * np.nan, classes), "finite"),
        (lambda image, boxes, classes: image, "failed: ValueError"),
        (lambda image, boxes, classes: 1 / 0, "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_mistake_names_the_image(result: Any, words: str, toy_yaml: Path) -> None:
    data = dataset(toy_yaml, lambda image, boxes, classes, rng: result(image, boxes, classes))
    with pytest.raises(UserError, match=f"--augment-with: the function, given the sample of {data.path(3)}, .*{words}"):
        data.item(3)


def test_it_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_hooks.py").write_text("class Family:\n    def blur(*a): return a[:3]\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    assert find_hook("my_own_hooks:Family.blur")(1, 2, 3, 4) == (1, 2, 3)  # type: ignore[arg-type]
    for name, words in (
        ("my_own_hooks", "must be module:function"),
        ("my_own_hooks:blur", "has no attribute 'blur'"),
        ("nosuch_module:blur", "No module named"),
        ("my_own_hooks:number", "is no function"),
    ):
        with pytest.raises(UserError, match=words):
            find_hook(name)


def test_mosaic_is_closed_from_an_epoch_on(toy_yaml: Path) -> None:
    """What the last epochs show is, pixel for pixel, what a recipe without mosaic shows."""
    recipe, plain = AugmentRecipe(mosaic=1.0, mixup=0.5), AugmentRecipe(mosaic=0.0)
    closing, never, always = (
        dataset(toy_yaml, None, each, mosaic_epochs=end) for each, end in ((recipe, 3), (plain, None), (recipe, None))
    )
    for epoch, same in ((2, always), (3, never), (7, never)):
        assert np.array_equal(closing.item(4, epoch).image, same.item(4, epoch).image)
    assert not np.array_equal(closing.item(4, 2).image, never.item(4, 2).image)
