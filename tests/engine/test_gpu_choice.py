"""Which GPU, how precise, how timed: of machines whose GPUs are made up."""

from typing import Any

import pytest
import torch

from sp_yolo.engine.validate import validate
from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.runtime import device as module
from sp_yolo.runtime.device import Compute, Stopwatch, select_compute, select_device


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("text", "index"),
    [("", 0), ("cuda", 0), ("0", 0), ("1", 1), ("cuda:1", 1), (" 2 ", 2), ("CUDA:3", 3)],
)
def test_one_process(monkeypatch: pytest.MonkeyPatch, text: str, index: int) -> None:
    gpus(monkeypatch, 4)
    assert select_device(text) == torch.device("cuda", index)


@pytest.mark.parametrize("text", ["0,1", "0, 1", "cuda:0,cuda:1", " cuda:0 , 1", "", "cuda"])
def test_each_process_takes_its_own(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    gpus(monkeypatch, 2)
    assert [select_device(text, rank, 2).index for rank in range(2)] == [0, 1]


def test_the_list_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    assert [select_device("6, 2", rank, 2).index for rank in range(2)] == [6, 2]


@pytest.mark.parametrize("text", ["", "cuda", "0", "cuda:0", "0,1,2,3"])
@pytest.mark.parametrize("shown", ["3", "GPU-8f1b2c3d-0000-1111-2222-333344445555", ""])
def test_a_launcher_that_shows_each_process_one_gpu(monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
    """Slurm's --gpus-per-task=1: process 3 of 4 sees one GPU, which is number 0 to it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    gpus(monkeypatch, 1)
    assert select_device(text, local_rank=3, processes=4) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("text", "rank", "processes", "words"),
    [
        ("0, 1", 0, 1, "to train on all of them: python -m torch.distributed.run --nproc-per-node 2 train_sp.py"),
        ("0,1", 2, 3, "2 GPUs, none for process 2"),
        ("5", 0, 1, "4 CUDA devices are available"),
        ("gpu", 0, 1, "expected cpu, mps, or a GPU number"),
        ("0,", 0, 1, "expected cpu, mps, or a GPU number"),
        ("GPU-8f1b2c3d", 0, 1, "expected cpu, mps, or a GPU number"),
        ("mps", 0, 2, "serves one process"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, text: str, rank: int, processes: int, words: str) -> None:
    gpus(monkeypatch, 4)
    with pytest.raises((UserError, EnvironmentFault)) as caught:
        select_device(text, rank, processes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "capability", "bf16", "amp", "words"),
    [
        ("NVIDIA H100", (9, 0), True, "auto", "NVIDIA H100, autocast bfloat16, channels_last"),
        ("NVIDIA H100", (9, 0), True, "off", "NVIDIA H100, float32 with TF32 convolutions, channels_last"),
        ("Tesla T4", (7, 5), False, "auto", "Tesla T4, autocast float16, channels_last"),
        ("Tesla T4", (7, 5), False, "off", "Tesla T4, float32, channels_last"),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), False, "auto", "NVIDIA GeForce GTX 1660 Ti, float32, channels_last"),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), False, "fp16", "GTX 1660 Ti, autocast float16, channels_last"),
    ],
)
def test_precision(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], bf16: bool, amp: str, words: str
) -> None:
    gpus(monkeypatch, 1)
    answers = {"get_device_name": name, "get_device_capability": capability, "is_bf16_supported": bf16}
    for asked, answer in answers.items():
        monkeypatch.setattr(torch.cuda, asked, lambda *_, answer=answer, **__: answer)
    told = []
    for order in ("set_device", "init", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, order, lambda *_, order=order: told.append(order))
    settings = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", settings.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # or monkeypatch would not take away what is set below
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert select_compute("", amp).words.endswith(words)
    assert told == ["set_device", "init", "reset_peak_memory_stats"]
    assert torch.backends.cudnn.benchmark and not settings

    assert select_compute("", amp, deterministic=True).words.endswith(f"{words}, deterministic")
    assert settings == [True] and not torch.backends.cudnn.benchmark
    assert module.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


class Stream:
    """A GPU that works for as long as it is told, while the host goes on at once."""

    now = 0.0


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at = Stream.now

    def synchronize(self) -> None:
        assert self.at >= 0

    def elapsed_time(self, other: "Event") -> float:
        return 1000 * (other.at - self.at)


def test_a_gpu_is_timed_where_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"), "forward", "backward", "never")
    for _ in range(2):
        watch.mark()
        Stream.now += 3
        watch.mark("forward")
        Stream.now += 5
        watch.mark("backward")
        Stream.now += 100
    assert watch.seconds() == {"forward": 6.0, "backward": 10.0, "never": 0.0}


def test_validation_is_timed_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The marks lie around the stages: time that only passes in the network is the inference's."""
    from support.one_step import batch

    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def network(images: torch.Tensor, augment: bool) -> Any:
        clock[0] += 7
        return torch.zeros(2, 1, 6), None

    class Evaluator:
        def update(self, *_: object) -> None:
            clock[0] += 50

    found = batch()._replace(metas=[])
    monkeypatch.setattr("sp_yolo.engine.validate.to_original", lambda *_: ([], []))
    outcome = validate(network, [found, found], Evaluator(), Compute(torch.device("cpu"), None, ""))  # type: ignore[arg-type]
    assert outcome.seconds == {"inference": 14.0, "nms": 0.0}
    assert validate(network, [], Evaluator(), Compute(torch.device("cpu"), None, "")).seconds["nms"] == 0  # type: ignore[arg-type]
