"""SPTrainer in the PyPI package, where it is installed: train, stop, resume, and the state that survives."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.datasets import ROW, yolo_set
from support.launcher import python

from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.optim import SP

COMMON = {"imgsz": 64, "batch": 2, "nbs": 2, "device": "cpu", "workers": 0, "plots": False, "verbose": False}
INSTALLED = importlib.util.find_spec("ultralytics") is not None


def test_package_is_imported_on_demand_only() -> None:
    code = "import sys, sp_yolo.plugins; print('ultralytics' in sys.modules)"
    assert python(code) == "False"


def test_unknown_names_are_refused() -> None:
    import sp_yolo.plugins

    with pytest.raises(AttributeError, match="SPTrainr"):
        sp_yolo.plugins.SPTrainr  # noqa: B018


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    monkeypatch.setitem(sys.modules, "ultralytics.models.yolo.detect", None)
    monkeypatch.delitem(sys.modules, "sp_yolo.plugins.ultralytics", raising=False)
    with pytest.raises(EnvironmentFault, match="needs ultralytics"):
        from sp_yolo.plugins import SPTrainer  # noqa: F401


class Interrupted(Exception):
    pass


@pytest.mark.skipif(not INSTALLED, reason="ultralytics is an optional host")
def test_train_stop_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    from sp_yolo.plugins import SPTrainer

    class Sparse(SPTrainer):
        sp = {"lr": 0.1, "sigma_backbone": 0.5, "every": 1}

    def stop(trainer: SPTrainer) -> None:
        raise Interrupted

    labels = {name: ROW for name in (*(f"train/{n}" for n in range(4)), "val/0", "val/1")}
    data = str(yolo_set(tmp_path, labels, ["box"]).path)
    first = YOLO("yolov8n.yaml")
    first.add_callback("on_model_save", stop)
    with pytest.raises(Interrupted):
        first.train(trainer=Sparse, data=data, epochs=2, warmup_epochs=1, project=str(tmp_path), name="run", **COMMON)
    optimizer = first.trainer.optimizer
    trainable = {id(p) for p in first.trainer.model.parameters() if p.requires_grad}
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert trainable <= set(grouped)
    assert optimizer.param_groups[0]["total_steps"] == 4  # 2 epochs of 2 batches, a step each
    buffers = [state["momentum_buffer"] for key, state in optimizer.state.items() if isinstance(key, torch.Tensor)]

    second = YOLO(str(tmp_path / "run" / "weights" / "last.pt"))
    restored: list[torch.Tensor] = []

    def look(trainer: SPTrainer) -> None:
        states = [state for key, state in trainer.optimizer.state.items() if isinstance(key, torch.Tensor)]
        restored.extend(state["momentum_buffer"].clone() for state in states)
        assert all(state["displacement"].abs().sum() == 0 for state in states)

    second.add_callback("on_train_start", look)
    capsys.readouterr()
    second.train(resume=True, trainer=Sparse)
    assert "SP: state restored from the checkpoint" in capsys.readouterr().out
    assert {tensor.dtype for tensor in restored} == {torch.float32}
    for saved, now in zip(buffers, restored, strict=True):
        torch.testing.assert_close(now, saved, rtol=2e-3, atol=1e-6)  # the host saved it in half precision
    final = second.trainer.optimizer
    assert isinstance(final, SP)
    assert final.sparsity()["backbone"] == pytest.approx(0.5, abs=1e-4)
    assert final.sparsity()["head"] == 0.0
    record = yaml.safe_load((tmp_path / "run" / "sp.yaml").read_text())
    assert (record["settings"]["lr"], record["progress"]["steps"]) == (0.1, 4)
    # The file that the host delivers is its average: rounded to half, with SP's zeros.
    names = {
        n for g in final.param_groups for n, r in zip(g["param_names"], g["roles"], strict=True) if r == "backbone"
    }
    delivered = YOLO(str(tmp_path / "run" / "weights" / "last.pt")).model
    weights = [p for name, p in delivered.named_parameters() if name in names and name != "model.0.conv.weight"]
    share = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    assert share == pytest.approx(0.5, abs=0.01)
    assert Path(YOLO(str(tmp_path / "run" / "weights" / "last.pt")).export(format="torchscript", imgsz=64)).is_file()


@pytest.mark.skipif(not INSTALLED, reason="ultralytics is an optional host")
def test_rates_and_log_are_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    from sp_yolo.plugins import SPTrainer

    data = str(yolo_set(tmp_path, {"train/0": ROW, "train/1": ROW, "val/0": ROW}, ["box"]).path)
    told = {"lr0": 0.02, "momentum": 0.8, "weight_decay": 5e-4, "warmup_bias_lr": 0.1, "warmup_epochs": 1}
    seen: dict[str, list] = {}
    for name, kind in (("host", {"optimizer": "SGD"}), ("sp", {"trainer": SPTrainer})):
        rates: list[list[tuple]] = []
        model = YOLO("yolov8n.yaml")
        model.add_callback("on_train_batch_end", lambda t, rates=rates: rates.append(described(t.optimizer)))
        model.train(data=data, epochs=2, project=str(tmp_path), name=name, **told, **kind, **{**COMMON, "batch": 1})
        seen[name] = rates
    assert seen["sp"] == seen["host"]
    columns = [(tmp_path / name / "results.csv").read_text().splitlines()[0] for name in ("host", "sp")]
    assert columns[0] == columns[1]


def described(optimizer: torch.optim.Optimizer) -> list[tuple]:
    return [
        (g["param_group"], g["lr"], g["momentum"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups
    ]


@pytest.mark.skipif(not INSTALLED, reason="ultralytics is an optional host")
@pytest.mark.parametrize("task", ["detect", "segment", "pose", "obb", "classify"])
def test_the_models_task_chooses_the_trainer(task: str, tmp_path: Path) -> None:
    from ultralytics.models import yolo

    from sp_yolo.plugins import SPTrainer

    class Mine(SPTrainer):
        sp = {"rho": 0.5}

    made = Mine.__new__(Mine, overrides={"task": task})
    names = {"obb": "OBBTrainer", "classify": "ClassificationTrainer", "segment": "SegmentationTrainer"}
    name = names.get(task, f"{task.capitalize()}ionTrainer" if task == "detect" else "PoseTrainer")
    assert isinstance(made, getattr(getattr(yolo, task), name))
    assert isinstance(made, Mine)
    assert (type(made).__module__, type(made).__qualname__) == (Mine.__module__, Mine.__qualname__)
    with pytest.raises(UserError, match="task=depth: SPTrainer trains detect, segment"):
        Mine.__new__(Mine, overrides={"task": "depth"})


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="ultralytics is an optional host")
def test_pose_trains_its_keypoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each task has beside boxes is in its log: its own trainer has run."""
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    from sp_yolo.plugins import SPTrainer

    rows = {
        "segment": "0 0.2 0.2 0.8 0.2 0.8 0.8 0.2 0.8\n",
        "pose": "0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.6 2\n",
        "obb": "0 0.2 0.2 0.8 0.2 0.8 0.8 0.2 0.8\n",
    }
    columns = {"segment": "seg_loss", "pose": "pose_loss", "obb": "metrics/mAP50(B)"}
    for task, row in rows.items():
        folder = tmp_path / task
        folder.mkdir()
        described = yolo_set(folder, {name: row for name in ("train/0", "train/1", "val/0")}, ["box"])
        if task == "pose":
            content = described.path.read_text() + "\nkpt_shape: [2, 3]\nflip_idx: [1, 0]\n"
            described.path.write_text(content)
        model = YOLO(f"yolov8n-{task.removesuffix('ment')}.yaml")
        model.train(trainer=SPTrainer, data=str(described.path), epochs=1, project=str(folder), name="run", **COMMON)
        header, values = (folder / "run" / "results.csv").read_text().splitlines()[:2]
        logged = dict(zip(header.split(","), values.split(","), strict=True))
        (name,) = [name for name in logged if name.endswith(columns[task]) and "val" not in name]
        assert float(logged[name]) > 0 or task == "obb"


@pytest.mark.skipif(not INSTALLED, reason="ultralytics is an optional host")
def test_another_optimizer_by_name_is_refused() -> None:
    from ultralytics import YOLO

    from sp_yolo.plugins import SPTrainer

    model = YOLO("yolov8n.yaml").model
    with pytest.raises(UserError, match="optimizer=AdamW"):
        SPTrainer.__new__(SPTrainer).build_optimizer(model, name="AdamW")
