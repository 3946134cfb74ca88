"""Memory that runs out in any command: one line that names what to lower, exit code 3."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import MINI

from sp_yolo.cli import COMMANDS, guarded
from sp_yolo.errors import EnvironmentFault
from sp_yolo.models import build_model, description
from sp_yolo.runtime.faults import explained

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 4 GiB.")
ERRORS = {
    "cuda": CUDA,
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 8 GB). Tried to allocate 2.50 GiB on shared pool."),
    "cpu": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2684354560 bytes."),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "python": MemoryError(),
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    import yaml

    model = build_model(yaml.safe_load(MINI))
    torch.save({**description(model), "ema": model.state_dict()}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def starve(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """No network gets the memory for its forward pass."""

    def forward(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("sp_yolo.models.build.DetectionModel.forward", forward)


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "Warning" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: out of memory"), lines
    return lines[0]


@pytest.mark.parametrize("kind", ERRORS)
def test_val(
    kind: str, weights: Path, toy_yaml: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    starve(monkeypatch, ERRORS[kind])
    monkeypatch.chdir(weights.parent)
    flags = ["--weights", str(weights), "--data", str(toy_yaml), "--img", "64", "--device", "cpu", "--workers", "0"]
    assert guarded("val", flags) == 3
    line = one_line(capfd)
    assert line.endswith("try a smaller --batch-size or --img-size")
    assert ("(asked for 2.50 GiB" in line) == (kind in ("cuda", "mps"))


def test_predict(
    weights: Path, toy_yaml: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    starve(monkeypatch, CUDA)
    monkeypatch.chdir(weights.parent)
    picture = next(toy_yaml.parent.rglob("*.jpg"))
    assert guarded("predict", ["--weights", str(weights), "--source", str(picture), "--device", "cpu"]) == 3
    assert one_line(capfd).endswith("(asked for 2.50 GiB): try a smaller --batch-size or --img-size")


def test_export(weights: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    starve(monkeypatch, CUDA)
    assert guarded("export", ["--weights", str(weights), "--format", "torchscript", "--img", "64"]) == 3
    assert one_line(capfd).endswith("try a smaller --batch-size or --img-size")
    assert [path.name for path in weights.parent.iterdir()] == ["w.pt"]


def test_classify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def starved(*_: Any, **__: Any) -> Any:
        raise CUDA

    monkeypatch.setattr("torch.nn.functional.cross_entropy", starved)
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "toy", "--samples", "40", "--epochs", "1", "--seeds", "1", "--device", "cpu"]
    assert guarded("classify", flags) == 3
    assert one_line(capfd).endswith("try a smaller --batch-size or --image-size")


def test_a_command_without_such_a_flag(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def starved(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("sp_yolo.commands.eval.coco_evaluate", starved)
    assert guarded("eval", ["truth.json", "found.json"]) == 3
    assert one_line(capfd) == "error: out of memory"


def test_every_other_runtime_error_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("sp_yolo.commands.eval.coco_evaluate", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        guarded("eval", ["truth.json", "found.json"])
    assert "eval" in COMMANDS


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            "kthvalue CUDA does not have a deterministic implementation, but you set 'torch.use_...",
            "--deterministic: kthvalue CUDA: torch has no such form",
        ),
        (
            "NCCL error: invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
            "two processes were given one GPU: start as many as there are GPUs",
        ),
    ],
)
def test_what_a_gpu_refuses_is_one_line(told: str, words: str) -> None:
    with pytest.raises(EnvironmentFault) as caught, explained(16, 640, 2):
        raise RuntimeError(told)
    assert str(caught.value) == words
