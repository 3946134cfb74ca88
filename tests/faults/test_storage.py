"""Disks that are full or read-only, folders that others use, data that were half made."""

import ctypes
import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
from support.datasets import yolo_set
from support.launcher import Program, Runs, fork_server, one_error

from sp_yolo.config import load_dataset_config
from sp_yolo.data import DetectionDataset, ensure_toy_dataset
from sp_yolo.errors import StorageError
from sp_yolo.runtime.checkpoint import load_checkpoint, save_checkpoint


def limit_files_to(size: int) -> None:
    """From the second checkpoint on, no file may grow beyond ``size`` bytes: what a full disk does to a writer."""
    from sp_yolo.engine import trainer

    save, saves = trainer.save_checkpoint, []

    def limited(*args: object, **kwargs: object) -> None:
        if saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        saves.append(1)
        save(*args, **kwargs)  # type: ignore[arg-type]

    trainer.save_checkpoint = limited


def test_disk_full_while_saving(runs: Runs) -> None:
    code, output = runs.train("--save-every", "1e-9", fault=(limit_files_to, (20_000,)))
    assert code == 5
    words = one_error(output)
    assert "last.pt: checkpoint could not be written (File too large); the previous file is untouched" in words
    weights = runs.weights()
    assert os.listdir(weights) == ["last.pt"]  # no half-written file takes the room that is missing
    assert load_checkpoint(weights / "last.pt")["progress"]["iteration"] == 1
    code, output = runs.resume(weights)
    assert code == 0, output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root; the limit above does not")
def test_file_system_full_while_saving(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        path = place / "last.pt"
        save_checkpoint(path, {"w": b"1" * 10_000}, keep_previous=True)
        with pytest.raises(StorageError, match="No space left on device"):
            save_checkpoint(path, {"w": b"2" * 100_000}, keep_previous=True)
        assert load_checkpoint(path)["w"] == b"1" * 10_000 and os.listdir(place) == ["last.pt"]
    finally:
        subprocess.run(["umount", str(place)], check=True)


def obey_permissions() -> None:
    """Root without this capability is refused what a user would be refused; for a user it changes nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: in force after the next exec


def test_read_only_project_folder(runs: Runs, program: Program) -> None:
    project = runs.folder / "locked"
    project.mkdir(mode=0o555)
    done = program.run(*runs.flags("--project", str(project)), preexec_fn=obey_permissions)
    assert done.returncode == 5, done.stderr
    assert one_error(done.stderr) == f"error: {project}/exp: run folder cannot be made: Permission denied"


def test_run_folder_that_becomes_read_only(runs: Runs, program: Program) -> None:
    code, output = runs.train("--epochs", "1")
    assert code == 0, output
    weights = runs.weights()
    before = (weights / "last.pt").read_bytes()
    weights.chmod(0o555)
    try:
        done = program.run("--resume", str(weights), "--epochs", "2", "--quiet", preexec_fn=obey_permissions)
    finally:
        weights.chmod(0o755)
    assert done.returncode == 5, done.stderr
    assert "could not be written (Permission denied); the previous file is untouched" in one_error(done.stderr)
    assert (weights / "last.pt").read_bytes() == before


def test_two_runs_started_in_the_same_second(runs: Runs) -> None:
    both = [runs.start(*runs.flags("--epochs", "1")) for _ in range(2)]
    assert [training.wait() for training in both] == [0, 0], [training.output for training in both]
    folders = sorted((runs.folder / "runs" / "train").iterdir())
    assert [folder.name for folder in folders] == ["exp", "exp2"]
    for folder in folders:
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
        assert json.loads((folder / "summary.json").read_text())["final"]["epoch"] == 0


def make_toy(root: str) -> None:
    ensure_toy_dataset(root, train=3000, val=5, image_size=64)


def test_interrupted_toy_data_are_made_again(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    process = fork_server().Process(target=make_toy, args=(str(root),))
    process.start()
    while not list(tmp_path.glob(".toy.*/images/train/*1.jpg")) and process.is_alive():
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -9 and not root.exists()
    data = DetectionDataset(load_dataset_config(ensure_toy_dataset(root, train=5, val=2, image_size=64)), "train", 64)
    assert len(data) == 5 and not data.warnings


@pytest.mark.parametrize("cache", [False, True, "disk"])
def test_a_changed_label_of_the_same_size_and_time_is_noticed(tmp_path: Path, cache: bool | str) -> None:
    classes = []
    for text in ("0 0.5 0.5 0.2 0.4\n", "1 0.5 0.5 0.2 0.4\n"):
        config = yolo_set(tmp_path, {"a": text})
        os.utime(tmp_path / "labels" / "a.txt", (1, 1))
        data = DetectionDataset(config, "train", 32, cache_images=cache)
        classes.append(float(data.item(0).labels[0, 0]))
    assert classes == [0, 1]
