"""`sp-yolo val` gives the trainer's figures to the bit; `sp-yolo predict` on files, folders, videos, mistakes."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support.launcher import small

from sp_yolo import Detector
from sp_yolo.boxes import xyxy_to_cxcywh
from sp_yolo.cli import main, main_train
from sp_yolo.eval import OriginalResult, yolov7_evaluate
from sp_yolo.runtime.device import select_compute


@pytest.fixture(scope="module")
def trained(toy_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; its weights are poor, so detections need a low threshold."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    flags = small(toy_yaml, "--epochs", "4", "--project", str(folder), "--set", "mosaic=0", "--set", "lr0=0.003")
    assert main_train(flags) == 0
    return folder / "exp"


def test_val_repeats_the_figures_of_training(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    weights = str(trained / "weights" / "best.pt")
    flags = ["--weights", weights, "--batch", "8", "--workers", "0", "--save-json", "--save-txt", "--save-conf"]
    assert main(["val", *flags]) == 0
    out = capsys.readouterr().out
    summary = json.loads((trained / "summary.json").read_text())["best"]
    lines = [line for line in out.splitlines() if "Average" in line]
    assert [float(line.rsplit("=", 1)[1]) for line in lines] == [round(value, 3) for value in summary["stats"]]

    run = trained / "runs" / "test" / "exp"
    assert main(["eval", str(toy_truth(trained)), str(run / "best_predictions.json")]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "Average" in line] == lines
    found = json.loads((run / "best_predictions.json").read_text())
    # The very detections of the training's last validation, to the bit: so is every figure made of them.
    assert found == json.loads((trained / "detections.json").read_text()) and found
    assert sorted(found[0]) == ["bbox", "category_id", "image_id", "score"]
    rows = [line.split() for file in (run / "labels").glob("*.txt") for line in file.read_text().splitlines()]
    assert len(rows) == len(found) and {len(row) for row in rows} == {6}
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("flags", [[], ["--batch", "1"], ["--batch", "3"], ["--batch", "32"]], ids=" ".join)
def test_val_gives_the_figures_of_training_in_batches_of_any_size(
    flags: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["val", "--weights", str(trained / "weights" / "best.pt"), "--workers", "0", *flags, "--save-json"]) == 0
    )
    out = capsys.readouterr().out
    summary = json.loads((trained / "summary.json").read_text())["best"]
    measured = [float(line.rsplit("=", 1)[1]) for line in out.splitlines() if "Average" in line]
    assert measured == [round(value, 3) for value in summary["stats"]]
    assert ("--batch-size 32 lowered to 8" in out) == (flags == ["--batch", "32"])
    found = json.loads((tmp_path / "runs" / "test" / "exp" / "best_predictions.json").read_text())
    before = json.loads((trained / "detections.json").read_text())
    assert len(found) == len(before)
    # A batch of another size is summed in another order; another padding would move the boxes by whole pixels.
    assert np.allclose([each["bbox"] for each in found], [each["bbox"] for each in before], atol=0.05)


def test_val_puts_class_names_of_another_order_in_place(
    trained: Path, toy_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = torch.load(trained / "weights" / "best.pt", weights_only=True)
    names, order = content["names"], [2, 0, 1, *range(3, len(content["names"]))]
    content["names"] = [names[number] for number in order]
    na = 3
    rows = [anchor * (len(names) + 5) + at for anchor in range(na) for at in (*range(5), *(5 + n for n in order))]
    for key, value in content["ema"].items():
        if key.startswith("model.77.") and ".m." in key:
            content["ema"][key] = value[rows]
        elif key.startswith("model.77.") and ".im." in key:
            content["ema"][key] = value[:, rows]
    torch.save(content, tmp_path / "turned.pt")
    assert main(["val", "--weights", "turned.pt", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    summary = json.loads((trained / "summary.json").read_text())["best"]
    measured = [float(line.rsplit("=", 1)[1]) for line in out.splitlines() if "Average" in line]
    assert "another order" in out and measured == [round(value, 3) for value in summary["stats"]]


def test_the_originals_own_metric_stands_below_ours(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # With the labels among the detections there is something to measure; the last box of each class is then taken out.
    measured = []

    def incomplete(truth: object, found: list[dict[str, int]], *, v5_metric: bool) -> OriginalResult:
        last = {record["category_id"]: record for record in found if record["score"] == 1}
        measured.append(yolov7_evaluate(truth, [r for r in found if r not in last.values()], v5_metric=v5_metric))
        return measured[-1]

    monkeypatch.setattr("sp_yolo.commands.val.yolov7_evaluate", incomplete)
    flags = ["--weights", str(trained / "weights" / "best.pt"), "--workers", "0", "--save-hybrid"]
    figures = []
    for more in ([], ["--v5-metric"]):
        assert main(["val", *flags, *more]) == 0
        out = capsys.readouterr().out
        assert "these figures are no measurement" in out
        figures.append(original_figures(out))
        assert figures[-1] == rounded(measured[-1])
    assert figures[1][2] > figures[0][2]  # the curve ends at recall 1, not at the last recall + 0.01


def original_figures(out: str) -> list[float]:
    line = next(line for line in out.splitlines() if "logs of the original" in line)
    return [float(part.split()[-1]) for part in line.split(": ")[1].split(",")]


def rounded(result: OriginalResult) -> list[float]:
    return [round(value, 3) for value in (result.precision, result.recall, result.map50, result.map50_95)]


def toy_truth(trained: Path) -> Path:
    data = torch.load(trained / "weights" / "best.pt", weights_only=True)["config"]["data"]
    return Path(data).parent / "annotations" / "val.json"


def test_val_tasks_and_hybrid(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = ["--weights", str(trained / "weights" / "best.pt"), "--workers", "0"]
    assert main(["val", *weights, "--task", "speed"]) == 0
    assert "ms NMS per image" in capsys.readouterr().out
    assert main(["val", *weights, "--save-hybrid"]) == 0
    hybrid = capsys.readouterr().out
    # Labels taken for detections of confidence 1 find themselves: recall is all but complete.
    assert float(next(line for line in hybrid.splitlines() if "IoU=0.50 " in line).rsplit("=", 1)[1]) > 0.95
    assert main(["val", *weights, "--augment", "--task", "train"]) == 0
    assert main(["val", *weights, "--task", "test"]) == 2
    assert "no 'test' split" in capsys.readouterr().err
    assert main(["val", *weights, "--conf", "7"]) == 2


def predict(trained: Path, source: str, *more: str) -> int:
    flags = ["--weights", str(trained / "weights" / "best.pt"), "--img", "64", "--conf", "0.001"]
    return main(["predict", *flags, "--device", "cpu", "--source", *source.split(" "), *more])


def test_predict_on_files(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = toy_truth(trained).parents[1] / "images" / "val"
    assert predict(trained, str(images), "--save-txt", "--save-json", "--save-conf") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9  # one per image, one that says where the results are
    run = tmp_path / "runs" / "detect" / "exp"
    records = json.loads((run / "detections.json").read_text())
    assert len(records) == 8 and sum(len(record["detections"]) for record in records) > 0
    record = max(records, key=lambda entry: len(entry["detections"]))
    stem = Path(record["image"]).stem
    text = [list(map(float, line.split())) for line in (run / "labels" / f"{stem}.txt").read_text().splitlines()]
    best = record["detections"][0]
    expected = xyxy_to_cxcywh(np.array(best["box_xyxy"])) / 64
    np.testing.assert_allclose(text[-1][1:5], expected, atol=1e-5)
    assert cv2.imread(str(run / f"{stem}.jpg")).shape == (64, 64, 3)

    assert predict(trained, str(images / "*_000[0-2].jpg"), "--nosave") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert not list((tmp_path / "runs" / "detect" / "exp2").glob("*.jpg"))


def test_images_of_one_name_do_not_overwrite_each_other(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, width in (("a", 64), ("b", 96)):
        (tmp_path / "in" / folder).mkdir(parents=True)
        cv2.imwrite(f"in/{folder}/x.jpg", np.full((64, width, 3), 90, np.uint8))
    assert predict(trained, "in", "--save-txt") == 0
    run = tmp_path / "runs" / "detect" / "exp"
    assert sorted(path.name for path in run.iterdir()) == ["labels", "x.jpg", "x_2.jpg"]
    assert sorted(path.name for path in (run / "labels").iterdir()) == ["x.txt", "x_2.txt"]
    assert cv2.imread(str(run / "x_2.jpg")).shape == (64, 96, 3)


def test_of_a_video_every_nth_frame_and_a_region(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Boxes of the region, moved to where it lies in the frame, are those of the region cut out by hand."""
    monkeypatch.chdir(tmp_path)
    writer = cv2.VideoWriter("in.avi", cv2.VideoWriter.fourcc(*"MJPG"), 6, (160, 96))
    for number in range(5):
        writer.write(np.random.default_rng(number).integers(0, 255, (96, 160, 3), dtype=np.uint8))
    writer.release()
    flags = ["--vid-stride", "2", "--region", "96", "32", "160", "96", "--save-json", "--batch-size", "2"]
    assert predict(trained, "in.avi", *flags) == 0
    written = json.loads((tmp_path / "runs" / "detect" / "exp" / "detections.json").read_text())
    assert [each["image"] for each in written] == [f"in.avi frame {number}" for number in (0, 2, 4)]
    capture = cv2.VideoCapture("runs/detect/exp/in.mp4")
    assert capture.get(cv2.CAP_PROP_FPS) == 3 and capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    capture = cv2.VideoCapture("in.avi")
    weights = str(trained / "weights" / "best.pt")
    detector = Detector(weights, select_compute("cpu", "auto"), image_size=64, conf_thres=0.001)
    for number in range(5):
        frame = capture.read()[1]
        if number % 2 == 0:
            entries = written[number // 2]["detections"]
            wanted = detector(np.ascontiguousarray(frame[32:96, 96:160]))
            assert len(entries) == len(wanted) > 0
            boxes = np.array([each["box_xyxy"] for each in entries])
            np.testing.assert_allclose(boxes, wanted.moved(96, 32).xyxy, atol=1)
    capsys.readouterr()
    for region, words in (
        ("5 5 5 9", "must be x1 y1 x2 y2"),
        ("1 2 3", "must be x1"),
        ("200 0 300 9", "outside the frames"),
    ):
        assert predict(trained, "in.avi", "--region", *region.split()) == 2
        assert words in capsys.readouterr().err


def test_predict_on_a_video(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    writer = cv2.VideoWriter("in.avi", cv2.VideoWriter.fourcc(*"MJPG"), 5, (96, 64))
    for shade in (40, 120, 200):
        writer.write(np.full((64, 96, 3), shade, np.uint8))
    writer.release()
    assert predict(trained, "in.avi") == 0
    assert "in.avi frame 2: 96x64" in capsys.readouterr().out
    capture = cv2.VideoCapture("runs/detect/exp/in.mp4")
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 3


def test_predict_mistakes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.jpg").write_text("not an image")
    assert predict(trained, "bad.jpg") == 0
    assert "bad.jpg: skipped" in capsys.readouterr().out
    (tmp_path / "notes.md").write_text("x")
    assert predict(trained, "notes.md") == 2
    assert "--source notes.md: .md is no format that is read here" in capsys.readouterr().err
    for source in ("nosuch.jpg", "folder", "*.png"):
        assert predict(trained, source) == 2
        assert f"--source {source}" in capsys.readouterr().err
    assert predict(trained, "bad.jpg", "--classes", "99") == 2
    assert "--classes 99" in capsys.readouterr().err


def test_predict_lists_a_folder_as_training_does(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    image = np.full((64, 96, 3), 90, np.uint8)
    data = cv2.imencode(".png", image)[1].tobytes()
    kept = ["in/a.png", "in/b.JPG_1", "in/photo", "in/sub/c.jfif"]
    for name in (*kept, "in/.ipynb_checkpoints/a.png", "in/@eaDir/a.png", "in/._a.png", "in/.hidden.png"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name in ("Thumbs.db", "desktop.ini", "notes.txt", "labels.csv"):
        (Path("in") / name).write_text("x")
    Path("in/again").symlink_to(Path("in").resolve())
    writer = cv2.VideoWriter("in/clip.AVI", cv2.VideoWriter.fourcc(*"MJPG"), 5, (96, 64))
    writer.write(image)
    writer.release()
    shutil.copy("in/clip.AVI", "clip.unknown")
    everything = [*kept, "in/clip.AVI frame 0"]
    for source, expected in (
        ("in", everything),
        ("in/**", everything),
        ("in/**/*.png", ["in/a.png"]),
        ("i?", everything),
        ("in/._a.png", ["in/._a.png"]),
        ("clip.unknown", ["clip.unknown frame 0"]),
    ):
        assert predict(trained, source) == 0
        out = capsys.readouterr().out
        assert [line.split(": ")[0] for line in out.splitlines() if "96x64" in line] == expected, source
        if expected == everything:
            assert "4 pictures in hidden or system folders left out" in out and "1 links to folders" in out


def test_predict_on_several_sources_and_lists(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in "abc":
        cv2.imwrite(str(tmp_path / "in" / f"{name}.png"), np.full((64, 96, 3), 90, np.uint8))
    (tmp_path / "in" / "list.txt").write_bytes(b"\xef\xbb\xbf# two\r\na.png\r\n'in/b.png'\r\n\r\n")
    assert predict(trained, "in/list.txt in/c.png", "--no-trace") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out if "96x64" in line] == ["in/a.png", "in/b.png", "in/c.png"]
    (tmp_path / "lists.txt").write_text("in/list.txt\n")
    (tmp_path / "none.txt").write_text("# nothing\n\n")
    for source, words in (("lists.txt", "another list"), ("none.txt", "lists nothing"), ("x.png", "no image or video")):
        assert predict(trained, f"in/c.png {source}") == 2
        assert f"--source {source}: " in (err := capsys.readouterr().err) and words in err
    weights = str(trained / "weights" / "best.pt")
    for command in (["val"], ["predict", "--source", "in/c.png"]):
        assert main([*command, "--weights", weights, weights]) == 2
        assert "ensembles of several models are not supported" in capsys.readouterr().err
