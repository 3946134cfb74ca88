"""SPTrainer in the PyPI package, where it is installed: train, stop, resume, and the state that survives."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from support.datasets import ROW, yolo_set
from support.launcher import python

from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.optim import SP

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
def test_train_stop_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    from sp_yolo.plugins import SPTrainer

    class Sparse(SPTrainer):
        sp = {"lr": 0.1, "sigma_backbone": 0.5, "every": 1}

    def stop(trainer: SPTrainer) -> None:
        raise Interrupted

    labels = {name: ROW for name in (*(f"train/{n}" for n in range(4)), "val/0", "val/1")}
    data = str(yolo_set(tmp_path, labels, ["box"]).path)
    lrs: list[dict[str, float]] = []
    first = YOLO("yolov8n.yaml")
    first.add_callback("on_model_save", stop)
    first.add_callback(
        "on_train_batch_end", lambda t: lrs.append({g["name"]: g["lr"] for g in t.optimizer.param_groups})
    )
    common = {"imgsz": 64, "batch": 2, "nbs": 2, "device": "cpu", "workers": 0, "plots": False, "verbose": False}
    with pytest.raises(Interrupted):
        first.train(trainer=Sparse, data=data, epochs=2, warmup_epochs=1, project=str(tmp_path), name="run", **common)
    assert lrs[0] == {"backbone": 0.0, "head": 0.0, "bias": 0.1, "norm": 0.0}, "the host's warm-up knows the bias group"
    optimizer = first.trainer.optimizer
    trainable = {id(p) for p in first.trainer.model.parameters() if p.requires_grad}
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(trainable)
    assert set(grouped) == trainable
    assert optimizer.param_groups[0]["total_steps"] == 4  # 2 epochs of 2 batches, a step each
    buffers = [state["momentum_buffer"] for key, state in optimizer.state.items() if isinstance(key, torch.Tensor)]

    second = YOLO(str(tmp_path / "run" / "weights" / "last.pt"))
    restored: list[torch.Tensor] = []

    def look(trainer: SPTrainer) -> None:
        states = [state for key, state in trainer.optimizer.state.items() if isinstance(key, torch.Tensor)]
        restored.extend(state["momentum_buffer"].clone() for state in states)
        assert all(state["displacement"].abs().sum() == 0 for state in states)

    second.add_callback("on_train_start", look)
    second.train(resume=True, trainer=Sparse)
    assert {tensor.dtype for tensor in restored} == {torch.float32}
    for saved, now in zip(buffers, restored, strict=True):
        torch.testing.assert_close(now, saved, rtol=2e-3, atol=1e-6)  # the host saved it in half precision
    final = second.trainer.optimizer
    assert isinstance(final, SP)
    assert final.sparsity()["backbone"] == pytest.approx(0.5, abs=1e-4)
    assert final.sparsity()["head"] == 0.0


@pytest.mark.skipif(not INSTALLED, reason="ultralytics is an optional host")
def test_another_optimizer_by_name_is_refused() -> None:
    from ultralytics import YOLO

    from sp_yolo.plugins import SPTrainer

    model = YOLO("yolov8n.yaml").model
    with pytest.raises(UserError, match="optimizer=AdamW"):
        SPTrainer.build_optimizer(object.__new__(SPTrainer), model, name="AdamW")
