"""Tables, pictures and the HTML page, read back."""

from __future__ import annotations

import base64
import csv
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sp_yolo.errors import EnvironmentFault, StorageError
from sp_yolo.eval import coco_evaluate
from sp_yolo.report import boxes_of_targets, draw_mosaic, per_class_table, write_report
from sp_yolo.report.pictures import class_color
from sp_yolo.report.plots import draw_curves, draw_history

NAMES = ["cat", "<b>dog</b>", "unseen"]


def example() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    truth = {
        "images": [{"id": 1}, {"id": 2}, {"id": 3}],
        "categories": [{"id": n, "name": name} for n, name in enumerate(NAMES, 1)],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 40]},
            {"image_id": 1, "category_id": 2, "bbox": [70, 10, 20, 60]},
            {"image_id": 2, "category_id": 2, "bbox": [10, 50, 30, 30]},
        ],
    }
    found = [
        {"image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 40], "score": 0.9},
        {"image_id": 2, "category_id": 1, "bbox": [60, 60, 30, 30], "score": 0.8},
        {"image_id": 1, "category_id": 2, "bbox": [70, 10, 20, 60], "score": 0.7},
    ]
    return truth, found


def test_table_has_the_columns_of_the_original() -> None:
    lines = per_class_table(coco_evaluate(*example())).splitlines()
    assert [line.split() for line in lines] == [
        ["Class", "Images", "Labels", "P", "R", "mAP@.5", "mAP@.5:.95"],
        ["all", "3", "3", "0.75", "0.75", "0.752", "0.752"],
        ["cat", "1", "1", "0.5", "1", "1", "1"],
        ["<b>dog</b>", "2", "2", "1", "0.5", "0.505", "0.505"],
    ]
    assert {len(line) for line in lines} == {20 + 6 * 12}
    assert per_class_table(coco_evaluate(*example()), summary_only=True).splitlines() == lines[:2]


def striped(image_id: int) -> np.ndarray:
    image = np.full((100, 120, 3), 40, np.uint8)
    image[:, ::10] = 60 * image_id
    return image


class Page(HTMLParser):
    """Collects what a browser would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "img":
            self.sources.append(str(dict(attrs)["src"]))

    def handle_data(self, data: str) -> None:
        if self.rows and data.strip():
            self.rows[-1].append(data)


def test_report_holds_tables_and_pictures_and_needs_no_other_file(tmp_path: Path) -> None:
    truth, found = example()
    result = coco_evaluate(truth, found)
    history = [{"epoch": e, "box": 1 / (e + 1), "map50": e / 10, "val_cls": None} for e in range(5)]
    notes = write_report(
        tmp_path,
        result,
        truth,
        found,
        title="run <1>",
        facts={"weights": "a&b.pt"},
        history=history,
        read_image=striped,
    )
    assert notes == [f"report {tmp_path / 'report.html'}"]
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert "b" in page.tags and "<b>dog</b>" not in text  # names are shown, not obeyed
    assert page.rows[0][:2] == ["weights", "a&b.pt"]
    assert [row[0] for row in page.rows if len(row) >= 7] == ["Class", "all", "cat", "<b>dog</b>"]
    assert "run &lt;1&gt;" in text and result.summary_text.splitlines()[0] in text
    assert not re.search(r"(src|href)=['\"](?!data:)", text)
    names = ["results", "PR_curve", "F1_curve", "P_curve", "R_curve", "confusion_matrix", "worst_missed", "worst_false"]
    assert len(page.sources) == len(names)
    for name, source in zip(names, page.sources, strict=True):
        data = base64.b64decode(source.split("base64,")[1])
        path = next(tmp_path.glob(f"{name}.*"))
        assert data == path.read_bytes()
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert image is not None and image.std() > 5
    assert coco_evaluate(truth, tmp_path / "detections.json").stats == result.stats


def test_csv_has_full_precision_and_sizes(tmp_path: Path) -> None:
    truth, found = example()
    result = coco_evaluate(truth, found)
    write_report(tmp_path, result, truth, found, title="run")
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert [row["Class"] for row in rows] == ["all", "cat", "<b>dog</b>"]
    assert float(rows[0]["mAP@.5:.95"]) == result.map50_95
    assert float(rows[2]["AP medium"]) == result.per_class[1].ap_by_size[1] and rows[2]["AP large"] == ""
    assert not (tmp_path / "worst_missed.jpg").exists() and not (tmp_path / "results.png").exists()


def test_worst_images_are_those_with_most_faults(tmp_path: Path) -> None:
    truth, found = example()
    asked: list[int] = []

    def read(image_id: int) -> np.ndarray:
        asked.append(image_id)
        return striped(image_id)

    write_report(tmp_path, coco_evaluate(truth, found), truth, found, title="run", read_image=read)
    assert asked == [2, 2]  # image 2 has the one missed label and the one false box
    missed, false = (cv2.imread(str(tmp_path / f"worst_{kind}.jpg")) for kind in ("missed", "false"))
    assert missed.shape == false.shape == (400, 480, 3)  # 100 x 120 px at four times the size
    # the missed label's left edge at x = 10 is orange, the false box's at x = 60 red (BGR, JPEG)
    assert missed[280, 40, 2] > 180 and missed[280, 40, 0] < 80
    assert false[300, 240, 2] > 150 and false[300, 240, 1] < 100


def test_worst_images_have_their_file_names_and_are_drawn_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, found = example()
    truth["images"] = [
        {"id": n, "file_name": f"photos/{word}.jpg"} for n, word in enumerate(("one", "two", "three"), 1)
    ]
    written: list[str] = []
    monkeypatch.setattr("sp_yolo.report.pictures._write", lambda image, text, *_: written.append(text))
    result = coco_evaluate(truth, found)
    write_report(tmp_path, result, truth, found, title="run", read_image=striped)
    assert written.count("two.jpg") == 2 and "one.jpg" not in written
    right = [entry for entry in found if entry["image_id"] == 1]
    write_report(tmp_path, coco_evaluate(truth, right), truth, right, title="run", read_image=striped)
    assert (tmp_path / "worst_missed.jpg").exists()
    assert not (tmp_path / "worst_false.jpg").exists()  # of the evaluation before


def test_epochs_are_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr("sp_yolo.report.plots.save_figure", lambda figure, path: figures.append(figure))
    for epochs in (1, 3, 7):
        draw_history([{"epoch": e, "box": 1 / (e + 1)} for e in range(epochs)], tmp_path / "results.png")
        ticks = [tick for plot in figures[-1].axes for tick in plot.get_xticks()]
        assert ticks and all(tick == round(tick) for tick in ticks)


def test_without_matplotlib_the_report_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    truth, found = example()
    result = coco_evaluate(truth, found)
    notes = write_report(tmp_path, result, truth, found, title="run", read_image=striped)
    assert notes[0] == "plots need matplotlib: pip install 'sp-yolo[plots]'" and len(notes) == 2
    assert len(Page((tmp_path / "report.html").read_text()).sources) == 2
    with pytest.raises(EnvironmentFault, match="pip install"):
        draw_curves(result.curves, tmp_path)


def test_curves_of_an_empty_evaluation_can_be_drawn(tmp_path: Path) -> None:
    truth, _ = example()
    for found in ([], example()[1]):
        result = coco_evaluate({**truth, "annotations": []}, found)
        assert len(draw_curves(result.curves, tmp_path)) == 4
    draw_history([], tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_full_disk_or_missing_folder_is_one_line(tmp_path: Path) -> None:
    truth, found = example()
    with pytest.raises(StorageError, match=r"per_class\.csv: cannot be written"):
        write_report(tmp_path / "absent", coco_evaluate(truth, found), truth, found, title="run")
    with pytest.raises(StorageError, match="picture cannot be written"):
        draw_mosaic(np.zeros((1, 3, 32, 32), np.uint8), [np.zeros((0, 5))], NAMES, tmp_path / "absent" / "x.jpg")
    with pytest.raises(StorageError, match="picture cannot be written"):
        draw_history([], tmp_path / "absent" / "results.png")


def test_mosaic_places_images_and_colours_boxes(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 64, 96, dtype=torch.uint8)
    images[1, 0], images[2, 2] = 200, 200  # the second is red, the third blue (RGB)
    boxes = [np.array([[10.0, 40, 50, 60, 1]]), torch.tensor([[20.0, 30, 60, 50, 0.2, 0]]), np.zeros((0, 6))]
    path = tmp_path / "batch.png"
    draw_mosaic(images, boxes, NAMES, path)
    picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert picture.shape == (128, 192, 3)
    assert picture[20, 140].tolist() == [200, 0, 0] and picture[100, 50].tolist() == [0, 0, 200]
    assert picture[100, 150].tolist() == [255, 255, 255]  # no fourth image
    assert np.abs(picture[50, 10].astype(int) - class_color(1)).max() < 30  # left edge of the first box
    assert (picture[:64, 98:190] == [200, 0, 0]).mean() > 0.95  # a box scored at .2 is not drawn
    draw_mosaic(images, boxes, NAMES, path, confidence=0.1, titles=["a/b/name.jpg"])
    again = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert np.abs(again[45, 116].astype(int) - class_color(0)).max() < 30
    assert (again[3:14, 4:60] > 100).mean() > 0.3  # the title's plate


def test_mosaic_shrinks_large_batches(tmp_path: Path) -> None:
    path = tmp_path / "batch.jpg"
    draw_mosaic(np.full((20, 3, 640, 640), 90, np.uint8), [np.zeros((0, 5))] * 20, NAMES, path)
    assert max(cv2.imread(str(path)).shape) == 1920


def test_boxes_of_targets_are_pixels_per_image() -> None:
    targets = torch.tensor([[1.0, 2, 0.5, 0.5, 0.5, 0.25], [0, 1, 0.25, 0.5, 0.1, 0.2]])
    boxes = boxes_of_targets(targets, 3, (64, 128))
    assert boxes[1].tolist() == [[32, 24, 96, 40, 2]]
    np.testing.assert_allclose(boxes[0], [[25.6, 25.6, 38.4, 38.4, 1]], rtol=1e-6)
    assert boxes[2].shape == (0, 5)


def test_report_file_is_json_serialisable_from_paths(tmp_path: Path) -> None:
    truth, found = example()
    paths = tmp_path / "truth.json", tmp_path / "found.json"
    for path, content in zip(paths, (truth, found), strict=True):
        path.write_text(json.dumps(content))
    write_report(tmp_path, coco_evaluate(*paths), *paths, title="run")
    assert not (tmp_path / "detections.json").exists()  # the caller's file is there already


def test_mosaic_leaves_the_batch_alone(tmp_path: Path) -> None:
    """A batch in channels_last memory is one view away from the drawing."""
    images = torch.full((2, 32, 32, 3), 90, dtype=torch.uint8).permute(0, 3, 1, 2)
    draw_mosaic(images, [np.array([[2, 2, 20, 20, 0.0]])] * 2, NAMES, tmp_path / "x.png")
    assert images.unique().tolist() == [90]
