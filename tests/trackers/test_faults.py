"""A tracker that is missing, fails, exits or hangs is one line; the run goes on and ends as without it."""

from __future__ import annotations

import logging
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launcher import CHECKOUT, OPTIONS
from support.trackers import epoch, start

from sp_yolo import Trainer
from sp_yolo.trackers import Callback, Callbacks, Step, in_background


def broken(monkeypatch: pytest.MonkeyPatch, method: str, fault: Callable[..., Any]) -> Callback:
    """The tracker of --log wandb, whose ``method`` does what ``fault`` does."""
    module: Any = types.ModuleType("sp_yolo.trackers.wandb")
    module.Tracker = type("Tracker", (Callback,), {method: fault})
    monkeypatch.setitem(sys.modules, "sp_yolo.trackers.wandb", module)
    return in_background("wandb")


def fail(*_: object) -> None:
    raise OSError("no route to host\nmore lines")


def leave(*_: object) -> None:
    sys.exit(3)


@pytest.mark.parametrize("fault", [fail, leave])
@pytest.mark.parametrize("method", ["on_start", "on_epoch", "on_files", "on_end"])
def test_a_fault_is_one_line(
    method: str,
    fault: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = broken(monkeypatch, method, fault)
    tracker.on_start(start(tmp_path))
    for number in range(3):
        tracker.on_epoch(epoch(number))
        tracker.on_files([])
    tracker.on_end({"best": {}})
    words = "no route to host" if fault is fail else "3"
    line = f"--log wandb: failed, nothing more is logged there; the run goes on: {words}"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_a_fault_in_a_thread_of_its_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorBoard writes in a thread of its own, which a full disk ends. Other threads are shown as before."""
    own = type("Writer", (threading.Thread,), {"__module__": "wandb.writer"})
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    tracker = broken(monkeypatch, "on_end", fail)
    tracker.on_start(start(tmp_path))
    for kind in (own, threading.Thread):
        thread = kind(target=fail)
        thread.start()
        thread.join()
    tracker.on_end({"best": {}})
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["no route to host"]
    assert len(shown) == 1 and threading.excepthook == shown.append


def test_one_that_is_missing_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "sp_yolo.trackers.wandb", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for asked_for, lines in ((False, 0), (True, 1)):
        tracker = in_background("wandb", asked_for=asked_for)
        tracker.on_start(start(tmp_path))
        tracker.on_end({})
        assert len(caplog.records) == lines
    assert "--log wandb: not installed" in caplog.text and "pip install 'sp-yolo[wandb]'" in caplog.text


def test_one_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sp_yolo.trackers.background.PATIENCE", 0.05)
    release = threading.Event()
    tracker = broken(monkeypatch, "on_epoch", lambda *_: release.wait(60))
    tracker.on_start(start(tmp_path))
    tracker.on_epoch(epoch(0))
    tracker.on_end({"best": {}})
    release.set()
    assert [record.getMessage() for record in caplog.records] == [
        "--log wandb: has not sent everything yet and is left behind"
    ]


class Diary(Callback):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.losses: list[torch.Tensor] = []

    def on_start(self, run: Any) -> None:
        self.lines.append(f"start {run.epoch} of {run.epochs} {run.identity}{' resumed' if run.resumed else ''}")

    def on_step(self, step: Step) -> None:
        self.losses.append(step.losses)
        self.lines.append(f"step {step.iteration}")

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.lines.append(f"epoch {record['epoch']}")
        assert torch.allclose(self.losses[-1][3], torch.tensor(record["total"]))

    def on_files(self, paths: Any) -> None:
        self.lines.append(" ".join(path.name for path in paths))

    def on_end(self, summary: Any) -> None:
        self.lines.append(f"end {'done' if summary else 'stopped'}")


class StopAfter(Callback):
    def on_epoch(self, record: dict[str, Any]) -> None:
        raise KeyboardInterrupt


def test_a_run_calls_back_in_order_and_goes_on_as_the_same_run(
    toy_yaml: Path, mini_cfg: str, tmp_path: Path, quick_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its first epoch by one callback; a tracker that fails from the start does not matter."""
    broken(monkeypatch, "on_start", fail)
    options = {**OPTIONS, "data": str(toy_yaml), "cfg": mini_cfg, "project": str(tmp_path), "epochs": 2}
    first, second = Diary(), Diary()
    with pytest.raises(KeyboardInterrupt):
        Trainer.new(**options, log=["wandb"], callbacks=[first, StopAfter()]).fit()
    summary = Trainer.resume(str(tmp_path / "exp"), quiet=True, callbacks=[second]).fit()
    assert summary["final"]["epoch"] == 1
    identity = (tmp_path / "exp" / "run_id").read_text().strip()
    steps = [f"step {number}" for number in range(1, 6)]
    drawn = [f"train_batch{number}.jpg" for number in range(3)]
    begun = [each for pair in zip(drawn, steps, strict=False) for each in pair] + steps[3:]
    assert first.lines == [f"start 0 of 2 {identity}", *begun, "epoch 0", "end stopped"]
    assert second.lines[0] == f"start 1 of 2 {identity} resumed"
    assert second.lines[1:7] == [f"step {number}" for number in range(6, 11)] + ["epoch 1"]
    assert "report.html" in second.lines[7] and second.lines[8:] == ["end done"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_is_at_most_40_lines(name: str) -> None:
    assert len((CHECKOUT / "sp_yolo" / "trackers" / f"{name}.py").read_text().splitlines()) <= 40


def test_what_is_not_watched_costs_nothing() -> None:
    assert not Callbacks([StopAfter(), in_background("wandb")]).steps and Callbacks([Diary()]).steps


def test_notes_go_through_logging_and_the_table_to_stdout(
    toy_yaml: Path,
    mini_cfg: str,
    tmp_path: Path,
    quick_runs: None,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "sp_yolo")
    options = {**OPTIONS, "data": str(toy_yaml), "cfg": mini_cfg, "project": str(tmp_path), "sync_bn": True}
    Trainer.new(**options, noplots=True, overrides={"lr0": 0.01}).fit()
    out = capsys.readouterr().out
    assert "gpu_mem" in out and "mAP@.5" in out and "Optimizer groups" not in out
    assert any(message.startswith("Optimizer groups: ") for message in caplog.messages)
    levels = {record.levelname for record in caplog.records if record.name == "sp_yolo"}
    assert "INFO" in levels and not any(message.startswith("warning: ") for message in caplog.messages)
