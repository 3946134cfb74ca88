"""Checkpoints and run directories: whole files or the previous ones, and words for every damage."""

import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

from sp_yolo.errors import StorageError, UserError
from sp_yolo.runtime.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from sp_yolo.runtime.folder import RESULT_COLUMNS, RunDir


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"w": torch.arange(3.0)}, "iteration": 7, "records": [{"lr": {"bias": 0.1}}]})
    content = load_checkpoint(path)
    assert content["iteration"] == 7 and content["records"] == [{"lr": {"bias": 0.1}}]
    assert torch.equal(content["model"]["w"], torch.arange(3.0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_failed_write_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"iteration": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        save_checkpoint(path, {"iteration": 2})
    assert load_checkpoint(path)["iteration"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"w": torch.arange(1000.0)}})
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "flipped": data}[damage])
    with pytest.raises((StorageError, UserError), match=r"last\.pt"):
        load_checkpoint(path)


class Gadget:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["GADGET_TARGET"],)


def test_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "proof"
    monkeypatch.setenv("GADGET_TARGET", str(target))
    torch.save({"format": "sp-yolo", "model": Gadget()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Gadget()))
    for name, error in (("zip.pt", UserError), ("bare.pt", StorageError)):
        with pytest.raises(error, match=name):
            load_checkpoint(tmp_path / name)
    assert not target.exists()


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nosuch.pt")


def test_runs_started_together_never_share_a_folder(tmp_path: Path) -> None:
    runs: list[Path] = []
    threads = [
        threading.Thread(target=lambda: runs.append(RunDir.create(str(tmp_path), "exp", False).path)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in runs) == ["exp", *(f"exp{number}" for number in range(2, 9))]
    assert RunDir.create(str(tmp_path), "exp", True).path == tmp_path / "exp"


def test_newest_checkpoint_is_the_newest(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / name / "weights").mkdir(parents=True)
        (tmp_path / name / "weights" / "last.pt").touch()
        os.utime(tmp_path / name / "weights" / "last.pt", (number % 2, number % 2))
    assert newest_checkpoint(tmp_path).parent.parent.name == "b"
    assert newest_checkpoint(tmp_path / "a" / "weights").parent.parent.name == "a"
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="--resume"):
        newest_checkpoint(tmp_path / "none")


def test_results_have_the_originals_columns(tmp_path: Path) -> None:
    record = {"epoch": 0, "gpu_mem": 2.34e9, "labels": 12, "img_size": 320, "extra": float("nan")}
    record |= {name: 0.125 for name in RESULT_COLUMNS if name not in record}
    run = RunDir.create(str(tmp_path), "exp", False)
    run.write_results([record, record | {"epoch": 1}], epochs=2)
    lines = (run.path / "results.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["0/1", "2.34G"], ["1/1", "2.34G"]]
    assert {len(line.split()) for line in lines} == {15}
    assert '"extra": null' in (run.path / "metrics.jsonl").read_text()
