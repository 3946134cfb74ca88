from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from support.datasets import RECIPE, coco_document, coco_set, jpeg, picture, voc_object, voc_set, yolo_set

from sp_yolo.boxes import boxes_to_original, cxcywh_to_xyxy
from sp_yolo.config import AugmentRecipe, DatasetConfig
from sp_yolo.data import DetectionDataset
from sp_yolo.errors import UserError

ROW = "0 0.5 0.5 0.2 0.4\n"


def _val(config: DatasetConfig, size: int = 64, **options: object) -> DetectionDataset:
    return DetectionDataset(config, "val", size, **options)  # type: ignore[arg-type]


def test_yolo_folder_counts_and_warns(tmp_path: Path) -> None:
    config = yolo_set(tmp_path, {"1": ROW, "2": "", "3": None, "4": f"{ROW}9 0.5 0.5 0.1 0.1\n"})
    (tmp_path / "images" / "5.jpg").write_bytes(b"")
    (tmp_path / "images" / "6.jpg").write_bytes(b"hello")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    dataset = _val(config)
    assert [Path(dataset.path(index)).name for index in range(len(dataset))] == ["1.png", "2.png", "3.png", "4.png"]
    expected = {"images": 4, "boxes": 2, "background": 2, "missing label files": 1, "broken images": 2}
    assert {key: dataset.counts[key] for key in expected} == expected and dataset.counts["class beyond nc"] == 1
    text = "\n".join(dataset.warnings)
    assert len(dataset.warnings) == 4 and "5.jpg: empty file" in text and "4.txt:2: class beyond nc: class 9" in text
    assert f"val: 1 of 6 images have no label file: {tmp_path}/labels/3.txt does not exist" in dataset.warnings
    np.testing.assert_allclose(dataset.labels[0], [[0, 0.5, 0.5, 0.2, 0.4]], atol=1e-7)
    assert dataset.shapes_wh.tolist() == [[60, 40]] * 4


def test_compat_leaves_out_an_image_with_a_bad_row(tmp_path: Path) -> None:
    config = yolo_set(tmp_path, {"1": ROW, "2": f"{ROW}9 0.5 0.5 0.1 0.1\n"})
    assert len(_val(config)) == 2 and len(_val(config, compat=True)) == 1


def test_list_files_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yolo_set(tmp_path / "set", {"1": ROW, "2": ROW, "3": ROW})
    listed = tmp_path / "set" / "val.txt"
    listed.write_text(f"./images/2.png\nset/images/1.png\nimages/3.png\n{tmp_path}/set/images/gone.png\n\n")
    monkeypatch.chdir(tmp_path)  # line 2 is relative to the working directory, line 3 to the root
    dataset = _val(replace(config, val=(str(listed),)))
    assert sorted(Path(dataset.path(index)).name for index in range(3)) == ["1.png", "2.png", "3.png"]
    assert dataset.counts["boxes"] == 3 and dataset.counts["missing images"] == 1
    assert "1 images do not exist, the first is" in dataset.warnings[0] and "gone.png" in dataset.warnings[0]


def test_images_in_the_middle_of_a_path(tmp_path: Path) -> None:
    config = yolo_set(tmp_path / "images" / "mine", {"1": ROW})
    assert _val(config).counts["boxes"] == 1


def test_edited_labels_are_seen_at_once(tmp_path: Path) -> None:
    """The original's label cache kept showing the old ones."""
    config = yolo_set(tmp_path, {"1": ROW})
    label = tmp_path / "labels" / "1.txt"
    status = label.stat()
    assert _val(config).labels[0][0, 0] == 0
    label.write_text(ROW.replace("0", "1", 1))  # same size
    os.utime(label, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert _val(config).labels[0][0, 0] == 1


@pytest.mark.parametrize("kind", ["voc", "auto"])
def test_voc(tmp_path: Path, kind: str) -> None:
    objects = voc_object() + voc_object("b", (30, 20, 60, 40), difficult=1) + voc_object("b", (5, 5, 5, 9))
    config = replace(voc_set(tmp_path, {"first": objects, "second": "", "gone": ""}), format=kind)
    (tmp_path / "JPEGImages" / "gone.jpg").unlink()
    if kind == "auto":
        config = replace(config, val=(str(tmp_path / "ImageSets" / "Main" / "train.txt"),))
    dataset = _val(config)
    assert len(dataset) == 2 and dataset.counts["missing images"] == 1 and dataset.counts["ignored"] == 1
    np.testing.assert_allclose(dataset.labels[0], [[0, 0.2, 0.2, 0.2, 0.2]], atol=1e-7)
    truth = dataset.ground_truth()
    assert [(row["bbox"], row["iscrowd"], row["ignore"], row["category_id"]) for row in truth["annotations"]] == [
        ([6, 4, 12, 8], 0, 0, 1),
        ([30, 20, 30, 20], 0, 1, 2),
    ]
    assert [image["id"] for image in truth["images"]] == [1, 2]
    assert "first.xml:8: zero area" in "\n".join(dataset.warnings)


@pytest.mark.parametrize("kind", ["coco", "auto"])
def test_coco_truth_is_the_file(tmp_path: Path, kind: str) -> None:
    document = coco_document()
    config = replace(coco_set(tmp_path, document), format=kind)
    if kind == "auto":
        config = replace(config, images={})  # found in the usual place
    dataset = _val(config)
    assert dataset.category_ids == [7, 90]
    truth = dataset.ground_truth()
    assert truth["images"] == document["images"]
    kept = [
        {key: row[key] for key in ("image_id", "category_id", "bbox", "iscrowd", "area")}
        for row in truth["annotations"]
    ]
    written = [
        {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        | {key: value for key, value in row.items() if key != "id"}
        for row in document["annotations"]  # type: ignore[attr-defined]
    ]
    assert kept == written
    assert [len(labels) for labels in dataset.labels] == [1, 1]  # the crowd is not trained on


def test_truth_loads_into_pycocotools_with_word_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = coco_document(
        images=[{"id": "x", "file_name": "one.png"}, {"id": "y", "file_name": "two.png"}],
        categories=[{"id": "cat", "name": "a"}, {"id": "dog", "name": "b"}],
        annotations=[{"image_id": "y", "category_id": "dog", "bbox": [1, 2, 30, 4]}],
    )
    coco = COCO()
    coco.dataset = _val(coco_set(tmp_path, document)).ground_truth()
    coco.createIndex()
    assert coco.getImgIds() == [1, 2] and coco.getAnnIds(imgIds=[2], catIds=[2]) == [1]
    assert coco.anns[1]["bbox"] == [1, 2, 30, 4]


def test_coco_missing_images_are_counted_and_leave_the_truth(tmp_path: Path) -> None:
    config = coco_set(tmp_path, coco_document())
    (tmp_path / "images" / "one.png").unlink()
    dataset = _val(config)
    assert dataset.counts["missing images"] == 1
    truth = dataset.ground_truth()
    assert [image["id"] for image in truth["images"]] == [9] and [row["image_id"] for row in truth["annotations"]] == [
        9
    ]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png"])
def test_coco_file_name_must_stay_in_the_image_folder(tmp_path: Path, name: str) -> None:
    config = coco_set(tmp_path, coco_document(images=[{"id": 5, "file_name": name}]))
    with pytest.raises(UserError, match="leads out of the image folder"):
        _val(config)


def test_what_cannot_be_trained_on_is_one_line(tmp_path: Path) -> None:
    config = yolo_set(tmp_path / "a", {"1": ""})
    with pytest.raises(UserError, match="not one labelled object in 1 images"):
        DetectionDataset(config, "train", 64, augment=RECIPE)
    assert len(_val(config)) == 1
    with pytest.raises(UserError, match="no 'test' split"):
        DetectionDataset(config, "test", 64)
    (tmp_path / "a" / "images" / "1.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no usable image in .*1.png: truncated or not an image") as caught:
        _val(config)
    assert "\n" not in str(caught.value)
    (tmp_path / "a" / "images" / "1.png").unlink()
    with pytest.raises(UserError, match="no image in it"):
        _val(config)
    with pytest.raises(UserError, match="in no usual place; set 'images:'"):
        _val(replace(coco_set(tmp_path / "b", coco_document(images=[{"id": 1, "file_name": "q.png"}])), images={}))


def test_single_class(tmp_path: Path) -> None:
    config = coco_set(tmp_path, coco_document())
    dataset = _val(config, single_class=True)
    assert {float(row[0]) for labels in dataset.labels for row in labels} == {0.0}
    truth = dataset.ground_truth()
    assert dataset.category_ids == [1] and {row["category_id"] for row in truth["annotations"]} == {1}
    assert truth["categories"] == [{"id": 1, "name": "item"}]


def test_several_entries_and_classes_without_a_category(tmp_path: Path) -> None:
    first = coco_set(tmp_path / "one", coco_document(), ("a", "x", "b"))
    second = coco_set(tmp_path / "two", coco_document(), ("a", "x", "b"))
    both = replace(first, val=(*first.val, *second.val), images={})  # type: ignore[misc]
    dataset = _val(both)
    assert dataset.category_ids == [7, 91, 90]
    assert [image["id"] for image in dataset.ground_truth()["images"]] == [1, 2, 3, 4]


def test_numbered_file_names_become_image_ids(tmp_path: Path) -> None:
    dataset = _val(yolo_set(tmp_path, {"000000000042": ROW, "000000000139": ROW}))
    assert [image["id"] for image in dataset.ground_truth()["images"]] == [42, 139]


def test_items_go_back_to_original_pixels(tmp_path: Path) -> None:
    import torch

    config = yolo_set(tmp_path, {"1": ROW})
    dataset = _val(config, 96, rect=True, pad=0.5)
    item = dataset[0]
    height, width = item.image.shape[:2]
    boxes = cxcywh_to_xyxy(torch.from_numpy(item.labels[:, 1:])) * torch.tensor([width, height, width, height])
    original = boxes_to_original(boxes, (height, width), item.meta.original_hw, item.meta.ratio_pad)
    np.testing.assert_allclose(original.numpy(), [[24, 12, 36, 28]], atol=1e-4)
    truth = dataset.ground_truth()["annotations"][0]["bbox"]
    np.testing.assert_allclose(truth, [24, 12, 12, 16], atol=1e-5)


def test_exif_rotated_image_is_trained_upright(tmp_path: Path) -> None:
    config = yolo_set(tmp_path, {"1": "0 0.25 0.25 0.5 0.5\n"})
    (tmp_path / "images" / "1.png").unlink()
    (tmp_path / "images" / "1.jpg").write_bytes(jpeg(picture(40, 60), 6))
    dataset = _val(config, 60)
    assert dataset.shapes_wh.tolist() == [[40, 60]]
    upright = cv2.cvtColor(cv2.rotate(picture(40, 60), cv2.ROTATE_90_CLOCKWISE), cv2.COLOR_BGR2RGB)
    assert np.abs(dataset[0].image[:, 10:50].astype(int) - upright).mean() < 3


def test_random_draws_depend_on_seed_epoch_index_and_repeat_alone(tmp_path: Path) -> None:
    config = yolo_set(tmp_path, {str(n): ROW for n in range(5)})
    dataset = DetectionDataset(config, "train", 64, augment=RECIPE, seed=3)
    first = dataset.item(2, epoch=4)
    dataset.item(1, epoch=9)
    again = DetectionDataset(config, "train", 64, augment=RECIPE, seed=3).item(2, epoch=4)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    others = [dataset.item(2, epoch=5), dataset.item(3, epoch=4), dataset.item(2, epoch=4, repeat=1)]
    others.append(DetectionDataset(config, "train", 64, augment=RECIPE, seed=4).item(2, epoch=4))
    for other in others:
        assert (other.image != first.image).any()


@pytest.mark.parametrize("rect", [False, True])
def test_training_items_are_well_formed(tmp_path: Path, rect: bool) -> None:
    square = "1 0.1 0.1 0.6 0.1 0.6 0.7 0.1 0.7\n"
    config = yolo_set(tmp_path, {str(n): ROW + square if n % 2 else "" for n in range(6)})
    dataset = DetectionDataset(config, "train", 64, augment=replace(RECIPE, mosaic=0.7, paste_in=0.7), rect=rect)
    boxes = 0
    for epoch in range(10):
        for index in range(len(dataset)):
            item = dataset.item(index, epoch)
            assert item.image.shape == (64, 64, 3) and item.image.dtype == np.uint8
            corners = cxcywh_to_xyxy(item.labels[:, 1:])
            assert (corners > -1e-6).all() and (corners < 1 + 1e-6).all() and (item.labels[:, 3:] > 0).all()
            assert set(item.labels[:, 0].tolist()) <= {0.0, 1.0}
            boxes += len(item.labels)
    assert boxes > 60


def test_without_augmentation_draws_a_plain_letterbox(tmp_path: Path) -> None:
    config = yolo_set(tmp_path, {"1": ROW})
    recipe = AugmentRecipe.of(dict.fromkeys(vars(RECIPE), 0.0))
    item = DetectionDataset(config, "train", 96, augment=recipe).item(0)
    # The factor is of [1 - scale, 1.1 + scale], at scale = 0 still 1 to 1.1: only the order of size is checked
    assert item.image.shape == (96, 96, 3)
    assert 0.2 <= item.labels[0, 3] <= 0.2201 and 0.4 * 64 / 96 <= item.labels[0, 4] <= 0.4401 * 64 / 96


def test_an_image_that_vanishes_during_training_is_named(tmp_path: Path) -> None:
    dataset = _val(yolo_set(tmp_path, {"1": ROW}))
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1.png: no such file \(it was readable when training began\)"):
        dataset[0]


# --------------------------------------------------------------------------------------------------------------- cache
@pytest.mark.parametrize("kind", [True, "auto", "disk"])
def test_caches_give_the_same_pixels(tmp_path: Path, kind: bool | str) -> None:
    config = yolo_set(tmp_path, {str(n): ROW for n in range(4)})
    plain = DetectionDataset(config, "train", 64, augment=RECIPE)
    cached = DetectionDataset(config, "train", 64, augment=RECIPE, cache_images=kind)
    for epoch in range(3):
        for index in range(4):
            np.testing.assert_array_equal(plain.item(index, epoch).image, cached.item(index, epoch).image)
    assert "cached" in cached.cache_note
    assert (tmp_path / ".image_cache").exists() == (kind == "disk")


def test_disk_cache_notices_a_changed_image_and_mends_a_damaged_file(tmp_path: Path) -> None:
    config = yolo_set(tmp_path, {"1": ROW})
    _val(config, cache_images="disk")[0]
    (kept,) = (tmp_path / ".image_cache").rglob("*.npy")
    kept.write_bytes(kept.read_bytes()[:50])
    np.testing.assert_array_equal(_val(config, cache_images="disk")[0].image, _val(config)[0].image)
    cv2.imwrite(str(tmp_path / "images" / "1.png"), picture(40, 60, 9))
    np.testing.assert_array_equal(_val(config, cache_images="disk")[0].image, _val(config)[0].image)


def test_processes_of_one_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 images of 64 x 42 px need 32 KB; half of 70 KB holds them all, half of that again does not."""
    config = yolo_set(tmp_path, {str(n): ROW for n in range(4)})
    free, size = 70_000, 3 * 64 * 42
    monkeypatch.setattr("sp_yolo.data.cache.free_memory", lambda: free)
    alone, shared = (DetectionDataset(config, "val", 64, cache_images=True, processes=n) for n in (1, 2))
    assert free / 4 < 4 * size < free / 2
    assert alone.in_memory and "4 images cached" in alone.cache_note
    assert not shared.in_memory and "2 of 4 cached" in shared.cache_note
