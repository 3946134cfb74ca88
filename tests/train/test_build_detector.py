"""Which model a run gets from --cfg and --weights."""

from pathlib import Path

import pytest
import torch

from sp_yolo.cli import main
from sp_yolo.config import load_config, load_dataset_config
from sp_yolo.engine.model import build_detector
from sp_yolo.models import build_model, description
from sp_yolo.models.weights import checkpoints


def said(folder: Path, toy_yaml: Path, stored: str, **settings: str) -> str:
    torch.manual_seed(0)
    model = build_model(stored, num_classes=6)
    torch.save({**description(model), "model": model.state_dict()}, folder / "weights.pt")
    lines: list[str] = []
    config = load_config(data=str(toy_yaml), weights=str(folder / "weights.pt"), **settings)
    built, _ = build_detector(config, config, load_dataset_config(str(toy_yaml)), single_class=False, say=lines.append)
    assert built.training and built.num_classes == 6
    return "\n".join(lines)


def test_deploy_weights_are_named_before_their_head_is_trained(tmp_path: Path, toy_yaml: Path) -> None:
    words = said(tmp_path, toy_yaml, "deploy/yolov7-tiny")
    assert "Transferred 338/338 items" in words  # 344 of the training form less 6 implicit vectors
    assert "these are deploy weights" in words and "--cfg MODEL" in words
    words = said(tmp_path, toy_yaml, "deploy/yolov7-tiny", cfg="yolov7-tiny")
    assert "these are deploy weights" not in words
    assert "deploy weights in a training model: implicit vectors start neutral" in words


def test_a_weights_file_is_read_once(tmp_path: Path, toy_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read_archive = checkpoints._read_archive

    def counted(archive: object, path: Path) -> object:
        opened.append(path.name)
        return read_archive(archive, path)

    monkeypatch.setattr(checkpoints, "_read_archive", counted)
    assert "Transferred 344/344 items" in said(tmp_path, toy_yaml, "yolov7-tiny")  # its grammar, then its weights
    assert opened == ["weights.pt"]


def test_the_folder_of_a_run_is_answered_by_its_best_weights(
    tmp_path: Path, toy_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "exp"
    (run / "weights").mkdir(parents=True)
    (tmp_path / "photo.png").write_bytes(b"x")  # predict looks for its sources first
    data = ["--data", str(toy_yaml)]
    commands = (["train", *data], ["val", *data], ["predict", "--source", str(tmp_path)], ["export"])
    for command, *more in commands:
        assert main([command, "--weights", str(run), *more]) == 2
        assert f"{run}: a folder, not a file of weights" in capsys.readouterr().err
    best = run / "weights" / "best.pt"
    best.write_bytes(b"x")
    for given in (run, run / "weights"):
        for command, *more in commands:
            assert main([command, "--weights", str(given), *more]) == 2
            error = capsys.readouterr().err
            assert f"{given}: a folder; did you mean {best}?" in error and error.count("\n") == 1


def test_training_weights_need_no_such_word(tmp_path: Path, toy_yaml: Path) -> None:
    assert "deploy" not in said(tmp_path, toy_yaml, "yolov7-tiny")
