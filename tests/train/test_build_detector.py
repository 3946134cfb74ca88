"""Which model a run gets from --cfg and --weights."""

from pathlib import Path

import torch

from sp_yolo.config import load_config, load_dataset_config
from sp_yolo.engine.model import build_detector
from sp_yolo.models import build_model, description


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


def test_training_weights_need_no_such_word(tmp_path: Path, toy_yaml: Path) -> None:
    assert "deploy" not in said(tmp_path, toy_yaml, "yolov7-tiny")
