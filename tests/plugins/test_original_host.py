"""The original's own trainer, as PyPI's yolov7detect ships it: a black box in a folder outside the repository."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from pypi_host import Host, installed
from support.datasets import ROW, yolo_set
from support.launcher import CHECKOUT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed("yolov7", tmp_path_factory.mktemp("host"), "yolov7detect==1.0.1")


def losses(program: Host, name: str) -> list[list[str]]:
    """Box, objectness, class and total loss of each epoch; with a single batch an epoch, of each step."""
    rows = (program.folder / "runs" / name / "results.txt").read_text().splitlines()
    return [row.split()[2:6] for row in rows]


@pytest.fixture(scope="module")
def program(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tmp_path_factory.mktemp("run")
    yolo_set(folder, {f"{split}/{index}": ROW for split in ("train", "val") for index in range(4)}, ["box"])
    cfg = (CHECKOUT / "sp_yolo" / "models" / "cfg" / "yolov7-tiny.yaml").read_text()
    (folder / "cfg.yaml").write_text(cfg.replace("nc: 80", "nc: 1"))
    shutil.copy(CHECKOUT / "hyp" / "hyp.scratch.tiny.yaml", folder / "hyp.yaml")
    return Host(folder, site, "yolov7")


COMMON = shlex.split("""
    --weights= --cfg cfg.yaml --data data.yaml --hyp hyp.yaml --epochs 2 --batch-size 4 --img-size 64 64
    --device cpu --workers 0 --project runs --noautoanchor --name
""")


def test_train_resume_and_test(program: Host) -> None:
    printed = program.plug_in("--sp", "lr=0.1", "sigma_backbone=0.5", "--", *COMMON, "sp")
    # 22 + 36 convolutions, 58 biases, 55 BatchNorm weights and 6 implicit vectors
    for row in ("0   61 tensors", "1   58 tensors", "22 backbone, 36 head", "58 bias", "layers 0 to 28"):
        assert row in printed
    assert "2 steps, gamma" in printed
    assert "zeros: 50.0 % of the backbone's weights" in printed
    # The host's own count of what it handed over
    assert "Optimizer groups: 58 .bias, 58 conv.weight, 61 other" in printed

    program.plainly(*COMMON, "sgd")
    assert losses(program, "sp")[0] == losses(program, "sgd")[0]
    assert losses(program, "sp")[1] != losses(program, "sgd")[1]

    record = (program.folder / "runs" / "sp" / "sp.yaml").read_text()
    resumed = program.plug_in("--", "--resume", "runs/sp/weights/epoch_000.pt")
    assert "state restored from the checkpoint" in resumed
    assert len(losses(program, "sp")) == 2
    again = (program.folder / "runs" / "sp" / "sp.yaml").read_text()
    assert yaml.safe_load(again)["settings"] == yaml.safe_load(record)["settings"]

    shutil.copy(program.folder / "runs/sp/weights/best.pt", program.folder / "yolov7.pt")
    # Without --weights: this host's test.py fails on the list that its own flag makes; yolov7.pt is its default.
    arguments = "--data data.yaml --img-size 64 --batch-size 2 --device cpu --project runs --name test"
    assert "Results saved to runs/test" in program.plug_in("--script", "test.py", "--", *shlex.split(arguments))


def test_checkpoint_holds_sp_and_loads_here(program: Host) -> None:
    from sp_yolo.models import build_model, load_weights

    program.plug_in("--sp", "rho=0.5", "--", *COMMON, "kept")
    inspect = "import torch; s = torch.load('runs/kept/weights/epoch_001.pt', weights_only=False)['optimizer']; "
    inspect += "print([sorted(set(g['roles'])) for g in s['param_groups']], s['param_groups'][0]['k'])"
    assert "[['norm'], ['backbone', 'head'], ['bias']] 2" in program(
        "-c", f"import sys; sys.path.append({str(program.host.parent)!r}); {inspect}"
    )
    weights = program.folder / "runs" / "kept" / "weights" / "best.pt"
    model = build_model("yolov7-tiny", num_classes=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, weights)
    assert not torch.equal(model.state_dict()["model.0.conv.weight"], before["model.0.conv.weight"])


def test_a_batch_without_targets_on_a_cpu(program: Host) -> None:
    """Images come in the order of their names: two without labels, and no mosaic, make an empty first batch."""
    hyp = (program.folder / "hyp.yaml").read_text()
    for key in ("mosaic: 1.0", "mixup: 0.05", "paste_in: 0.05"):
        assert key in hyp
        hyp = hyp.replace(key, f"{key.split(':')[0]}: 0.0")
    (program.folder / "plain.yaml").write_text(hyp)
    for cache in program.folder.rglob("*.cache"):
        cache.unlink()
    kept = {index: (program.folder / "labels" / "train" / f"{index}.txt") for index in (0, 1)}
    for path in kept.values():
        path.write_text("")
    arguments = [{"hyp.yaml": "plain.yaml", "4": "2"}.get(argument, argument) for argument in COMMON]
    program.plug_in("--", *arguments, "empty")
    first = (program.folder / "runs" / "empty" / "results.txt").read_text().splitlines()[0].split()
    assert float(first[3]) > 0
