"""What single flags do to a run, and what becomes of odd data sets; in this process, on a tiny network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.launcher import OPTIONS, small

from sp_yolo.cli import main, main_train
from sp_yolo.config import load_config
from sp_yolo.engine import Trainer, progress
from sp_yolo.engine.inputs import image_weights


class Run:
    """`train_sp.py` with a tiny network in a folder of its own."""

    def __init__(self, data: Path, cfg: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.data, self.cfg, self.folder, self.capsys = data, cfg, folder, capsys

    def __call__(self, *flags: str, data: Path | None = None, code: int = 0) -> str:
        """Train one epoch, or as ``flags`` say; what it printed."""
        assert main_train([*small(data or self.data, "--epochs", "1", "--cfg", self.cfg), *flags]) == code
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out if code == 0 else captured.err

    def weights(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / "runs" / "train" / name / "weights").iterdir())

    def records(self, name: str) -> list[dict]:
        text = (self.folder / "runs" / "train" / name / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def run(
    toy_yaml: Path,
    mini_cfg: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quick_runs: None,
) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(toy_yaml, mini_cfg, tmp_path, capsys)


def test_flags_together(run: Run) -> None:
    out = run(
        *("--multi-scale", "--image-weights", "--rect", "--single-cls", "--label-smoothing", "0.1", "--linear-lr"),
        *("--save_period", "1", "--freeze", "2", "--name", "a", "--adam", "--cache", "--v5-metric"),
    )
    assert any(line.split()[:1] == ["0/0"] for line in out.splitlines())
    assert "--rect is not followed" in out and "frozen: 6 tensors of 2 layers" in out
    assert [line for line in out.splitlines() if "matplotlib" in line] == [
        "plots need matplotlib: pip install 'sp-yolo[plots]'"
    ]
    assert run.weights("a") == ["best.pt", "best.safetensors", "epoch_000.pt", "last.pt"]
    weights = torch.load(run.folder / "runs/train/a/weights/last.pt", weights_only=True)
    assert weights["names"] == ["item"] and weights["hyp"]["label_smoothing"] == 0.1
    before = torch.load(run.folder / "runs/train/a/weights/best.pt", weights_only=True)["ema"]["model.0.conv.weight"]
    assert torch.equal(weights["model"]["model.0.conv.weight"], before)
    assert not torch.equal(weights["model"]["model.2.conv.weight"], weights["ema"]["model.2.conv.weight"])
    assert "(SGD, lr0 0.01" in run("--rect", "--name", "a", "--exist-ok", "--compat")
    assert not (run.folder / "runs" / "train" / "a2").exists()
    assert run("--quad", "--name", "b")


def test_patience_counts_validated_epochs_and_its_stop_is_saved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--epochs", "4", "--notest", "--patience", "1", "--name", "blind")
    records = run.records("blind")
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    # What an epoch without validation did not measure is no figure; in results.txt it is 0, as in the original.
    assert [record["map50_95"] is None for record in records] == [True, True, True, False]
    assert [record["val_box"] is None for record in records] == [True, True, True, False]
    lines = (run.folder / "runs/train/blind/results.txt").read_text().splitlines()
    assert [line.split()[11] == "0" for line in lines[:3]] == [True] * 3 and "nan" not in "".join(lines)
    monkeypatch.setattr(progress, "fitness", lambda record: 0.5)
    out = run("--epochs", "9", "--nosave", "--patience", "2", "--name", "still", "--set", "lr0=0.003")
    assert "no better epoch for 2 epochs" in out and len(run.records("still")) == 3
    assert run.weights("still") == ["best.pt", "best.safetensors", "last.pt"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--freeze", "8"], "--freeze 8: nothing is left to train"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--img", "64", "0"], "--img-size 64 0: must lie in [1, 8192]"),
        (["--set", "root=5"], "dataset root '5' is no folder"),
        (["--set", "lr0=2020-13-45"], "lr0 = '2020-13-45': must be a number"),
        (["--optimizer", "SparseAdam"], "--optimizer sparseadam: not sp,"),
        (["--adam", "--optimizer", "sgd"], "give one of the two"),
        (["--evolve", "0"], "--evolve 0: must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(run: Run, flags: list[str], words: str) -> None:
    assert words in run(*flags, code=2)
    assert not (run.folder / "runs").exists()


def test_recipe_by_size_anchors_and_momentum(toy_yaml: Path, mini_cfg: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "data": str(toy_yaml), "cfg": mini_cfg, "project": str(tmp_path)}
    trainer = Trainer(load_config(**{**options, "noautoanchor": False}, overrides={"anchors": 4}, optimizer="SGD"))
    assert trainer.run.recipe_path.endswith("sgd.yaml") and trainer.options.optimizer == "sgd"
    assert trainer.run.model.head.anchors.shape == (3, 4, 2)
    assert float(trainer.run.model.head.anchor_grid.min()) > 2  # fitted, not placeholders
    other = Trainer(load_config(**options, optimizer="RMSprop"))
    other.fit()
    assert {group["momentum"] for group in other.run.state.optimizer.param_groups} == {0}


def test_image_weights_without_anything_to_prefer_are_equal() -> None:
    labels = [np.array([[0, 0.5, 0.5, 0.1, 0.1]], np.float32), np.zeros((0, 5), np.float32)]
    assert image_weights(labels, [1.0]).tolist() == [1, 1]
    assert image_weights(labels, [0.5]).tolist() == [0.25, 0]


def changed_yaml(toy_yaml: Path, folder: Path, **changes: object) -> Path:
    values = {**yaml.safe_load(toy_yaml.read_text()), **changes}
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def test_without_val_split_and_with_more_batch_than_images(run: Run) -> None:
    out = run("--batch", "64", data=changed_yaml(run.data, run.folder, val=None))
    assert "no 'val' split is given, validating on the training images" in out
    assert "--batch-size 64 lowered to the 20 training images" in out


def test_class_and_images_without_labels(run: Run) -> None:
    root = Path(yaml.safe_load(run.data.read_text())["root"])
    document = json.loads((root / "annotations" / "train.json").read_text())
    gone = document["categories"][0]["id"]
    bare = {image["id"] for image in document["images"][:3]}
    document["annotations"] = [
        entry for entry in document["annotations"] if entry["category_id"] != gone and entry["image_id"] not in bare
    ]
    (run.folder / "train.json").write_text(json.dumps(document))
    data = changed_yaml(run.data, run.folder, train=str(run.folder / "train.json"))
    assert "20 training images" in run("--epochs", "2", "--image-weights", data=data)


def test_weights_of_a_run_start_another_with_other_classes(run: Run) -> None:
    run("--name", "six", "--set", "lr0=0.003")
    best = run.folder / "runs/train/six/weights/best.pt"
    data = changed_yaml(run.data, run.folder, names=[*yaml.safe_load(run.data.read_text())["names"], "hexagon"])
    out = run("--cfg", "", "--weights", str(best), "--name", "seven", data=data)
    assert "6 classes and the model 7" in out and "sp.yaml" in out
    seven = str(run.folder / "runs/train/seven/weights/best.pt")
    assert main(["val", "--weights", seven, "--data", str(run.data), "--workers", "0"]) == 2
    assert "7 classes, but" in run.capsys.readouterr().err
    assert main(["val", "--weights", seven, "--data", str(run.data), "--workers", "0", "--single-cls"]) == 0


def test_another_working_directory_finds_data_and_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths given in one folder; resumed and measured in another."""
    (run.folder / "elsewhere").mkdir()
    local = changed_yaml(run.data, run.folder)
    cfg = run.folder / "net.yaml"
    cfg.write_text(Path(run.cfg).read_text())
    run("--cfg", cfg.name, "--batch", "8", "--name", "a", "--set", "lr0=0.003", data=Path(local.name))
    last = run.folder / "runs" / "train" / "a" / "weights" / "last.pt"
    cfg.unlink()
    monkeypatch.chdir(run.folder / "elsewhere")
    assert main(["val", "--weights", str(last), "--workers", "0"]) == 0
    (last.parents[1] / "summary.json").unlink()  # as if stopped while the last validation ran
    flags = ["--resume", str(last), "--batch", "8", "--seed", "9", "--data", local.name, "--quiet"]
    assert main_train(flags) == 0
    out = run.capsys.readouterr().out
    assert "warning: --resume goes on with the run's own options, not the --seed given now" in out
    assert (last.parents[1] / "summary.json").exists()
    local.unlink()  # a complete run has no need of its data
    assert main_train(["--resume", str(last)]) == 2
    captured = run.capsys.readouterr()
    assert "the run is already complete (1 epochs); a larger --epochs extends it" in captured.err and not captured.out
    (run.folder / "elsewhere" / "last.pt").write_bytes(last.read_bytes())
    assert main_train(["--resume", "last.pt"]) == 2
    assert "last.pt: not in the weights folder" in run.capsys.readouterr().err


@pytest.mark.parametrize("command", ["val", "predict"])
@pytest.mark.parametrize("flag", ["--conf", "--iou", "--img"])
def test_numbers_out_of_bounds(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--source", "x.jpg"] if command == "predict" else []
    assert main([command, "--weights", "nosuch.pt", *source, flag, "-5"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {flag}") and ": must lie in [" in err and "-5" in err
