"""Processes that are stopped, die, or find no memory."""

import json
import os
import resource
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launcher import Runs, Training, fingerprint, one_error

LONG = ("--epochs", "4000", "--notest")


def training_on(runs: Runs, *flags: str) -> Training:
    """A long run that has saved at least once."""
    training = runs.start(*runs.flags(*LONG, *flags))
    training.wait_for(lambda: (runs.weights() / "last.pt").exists())
    return training


def children(pid: int | None) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------------------------------------------------- signals
def signal_at(iteration: int, number: int) -> None:
    """A signal to this process and its data workers, as a terminal and a batch system send it."""
    from sp_yolo.engine.step import TrainStep

    call = TrainStep.__call__

    def interrupted(step: TrainStep, batch: Any) -> bool:
        if step.state.progress.iteration == iteration:
            for pid in (*children(os.getpid()), os.getpid()):
                os.kill(pid, number)
        return call(step, batch)

    TrainStep.__call__ = interrupted  # type: ignore[method-assign]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves_it(runs: Runs, number: signal.Signals) -> None:
    summed = ("--set", "nominal_batch=16", "--set", "warmup_epochs=0")  # a step every 4 batches: workers must go on
    code, output = runs.train("--name", "whole", *summed)
    assert code == 0, output
    code, output = runs.train("--name", "cut", "--workers", "1", *summed, fault=(signal_at, (5, int(number))))
    assert code == 128 + number and "Traceback" not in output, output
    words = "interrupted (Ctrl-C)" if number == signal.SIGINT else "stopped by SIGTERM"
    assert f"{words}, saved; go on with: --resume runs/train/cut" in output
    last = runs.weights("cut") / "last.pt"
    assert torch.load(last, weights_only=True)["progress"]["iteration"] == 9
    code, output = runs.resume(last)
    assert code == 0, output
    assert fingerprint(last) == fingerprint(runs.weights("whole") / "last.pt")
    epochs = [json.loads(line)["epoch"] for line in (last.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [0, 1]


def stop_in_validation(epoch: int) -> None:
    from sp_yolo.engine import Trainer

    validate, calls = Trainer._validate, []

    def stopped(trainer: Trainer, draw: bool) -> Any:
        calls.append(draw)
        if len(calls) == epoch + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(trainer, draw)

    Trainer._validate = stopped  # type: ignore[method-assign]


@pytest.mark.parametrize("validation", [0, 1, 2])
def test_stopped_while_validating(runs: Runs, validation: int) -> None:
    """The first epoch's, the last epoch's and the final validation are done again, with the same outcome."""
    code, output = runs.train("--name", "whole")
    assert code == 0, output
    code, output = runs.train("--name", "cut", fault=(stop_in_validation, (validation,)))
    assert code == 143 and "--resume" in output, output
    code, output = runs.resume(runs.weights("cut"))
    assert code == 0, output
    whole, cut = (runs.weights(name) for name in ("whole", "cut"))
    assert fingerprint(cut / "last.pt") == fingerprint(whole / "last.pt")
    assert figures(cut) == figures(whole)


def figures(weights: Path) -> list[list[str]]:
    """results.txt without the column of peak memory."""
    rows = [line.split() for line in (weights.parent / "results.txt").read_text().splitlines()]
    return [[*row[:1], *row[2:]] for row in rows]


def hang_in_save() -> None:
    """A save that takes for ever once the new file is half-written, as on a network disk that does not answer."""

    def hanging(descriptor: int) -> None:
        Path("hanging").touch()
        time.sleep(600)

    from sp_yolo.runtime import checkpoint

    save, saves = checkpoint.torch.save, []

    def second_hangs(content: Any, file: Any) -> None:
        save(content, file)
        saves.append(1)
        if len(saves) == 2:
            os.fsync = hanging

    checkpoint.torch.save = second_hangs


def test_second_ctrl_c_stops_at_once_and_harms_no_file(runs: Runs) -> None:
    training = runs.start(*runs.flags(*LONG, "--save-every", "1e-9"), fault=(hang_in_save, ()))
    training.wait_for(lambda: (runs.folder / "hanging").exists())
    training.send(signal.SIGINT)
    time.sleep(0.5)
    assert training.process.is_alive()  # the first waits for the save
    training.send(signal.SIGINT)
    assert training.wait() == 130, training.output
    assert "Traceback" not in training.output
    weights = runs.weights()
    assert os.listdir(weights) == ["last.pt"]
    assert torch.load(weights / "last.pt", weights_only=True)["progress"]["iteration"] == 1
    code, output = runs.resume(weights, "--epochs", "1")
    assert code == 0, output


# ---------------------------------------------------------------------------------------------------- data workers
def test_a_dead_data_worker_is_one_line(runs: Runs) -> None:
    training = training_on(runs, "--workers", "1")
    (worker,) = children(training.process.pid)
    os.kill(worker, signal.SIGKILL)
    assert training.wait() == 3
    assert "a data worker process died" in one_error(training.output)


def test_no_worker_survives_a_killed_run(runs: Runs) -> None:
    training = training_on(runs, "--workers", "1")
    (worker,) = children(training.process.pid)
    training.send(signal.SIGKILL)
    training.wait()
    deadline = time.monotonic() + 30
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)


# ---------------------------------------------------------------------------------------------------------- memory
def forbid_more_memory_than(mebibytes: int) -> None:
    """From the first iteration on this process gets no more than that."""
    from sp_yolo.engine.step import TrainStep

    call = TrainStep.__call__

    def limited(step: TrainStep, batch: Any) -> bool:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + mebibytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        return call(step, batch)

    TrainStep.__call__ = limited  # type: ignore[method-assign]


def test_out_of_memory_says_batch_size_and_one_suggestion(runs: Runs) -> None:
    code, output = runs.train("--batch", "16", "--img", "1024", fault=(forbid_more_memory_than, (64,)))
    assert code == 3
    words = one_error(output)
    assert "out of memory at --batch-size 16 and --img-size 1024" in words and words.endswith("try --batch-size 8")


def forbid_memory_for_images() -> None:
    """From the first image of the first batch on there are 8 MiB more, and a mosaic of 2048 px tiles takes 48."""
    from sp_yolo.data import DetectionDataset

    item = DetectionDataset.item

    def limited(data: DetectionDataset, *arguments: int) -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + 8 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        return item(data, *arguments)

    DetectionDataset.item = limited  # type: ignore[method-assign]


def test_out_of_memory_while_loading_names_the_image(runs: Runs) -> None:
    code, output = runs.train("--img", "2048", fault=(forbid_memory_for_images, ()))
    assert code == 3
    assert "memory" in one_error(output) and ".jpg: not enough memory to load it" in output


# ----------------------------------------------------------------------------------------------------------- ranks
def join(rank: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def test_death_of_a_rank_ends_the_other_with_one_line(runs: Runs) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [runs.start(*runs.flags(*LONG), fault=(join, (rank, port))) for rank in range(2)]
    ranks[0].wait_for(lambda: (runs.weights() / "last.pt").exists())
    ranks[1].send(signal.SIGKILL)
    assert ranks[0].wait() == 3
    assert "another process of this run ended, so this one ends too" in one_error(ranks[0].output)
