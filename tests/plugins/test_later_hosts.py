"""Hosts of the later family: another order of groups, another log, other places; a host of our own in their shape."""

import gc
import json
import runpy
import sys
from pathlib import Path

import later_host
import pytest
import torch
import yaml
from support.pretend_cuda import Mismatch, PretendCuda

from sp_yolo.errors import UserError
from sp_yolo.plugins import patch_yolov7
from sp_yolo.plugins.checkout import find_host, process_state
from sp_yolo.plugins.yolov7 import run_script

SCRIPT = "det/train.py"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return later_host.write_later_host(tmp_path / "later")


def train(host: Path, *arguments: str, lines: list[str] | None = None, **settings) -> list[list[float]]:
    """The rate of each group at each step."""
    said: list[str] = [] if lines is None else lines
    assert run_script(host, arguments, script=SCRIPT, report=said.append, **settings) == 0
    return json.loads(Path("rates.json").read_text())


def plainly(host: Path, *arguments: str) -> list[list[float]]:
    """As ``train``, with the host's own optimizer."""
    found = find_host(host, SCRIPT)
    with process_state(found):
        sys.argv[:] = [SCRIPT, *arguments]
        runpy.run_path(str(found.script), run_name="__main__")
    return json.loads(Path("rates.json").read_text())


def checkpoint(host: Path) -> dict:
    with patch_yolov7(host, script=SCRIPT):
        return torch.load("runs/weights/last.pt")


def zeros(network: torch.nn.Module) -> dict[str, int]:
    return {name: int((p == 0).sum()) for name, p in network.named_parameters() if p.ndim == 4}


def test_groups_rates_and_log_are_the_hosts(host: Path, run_folder: Path) -> None:
    lines: list[str] = []
    ours = train(host, lines=lines)
    log = Path("runs/results.csv").read_text()
    groups = checkpoint(host)["optimizer"]["param_groups"]
    assert [set(group["roles"]) for group in groups] == [{"bias"}, {"backbone", "head"}, {"norm"}]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0005, 0.0]
    assert groups[1]["roles"] == ["backbone", "backbone", "head", "head", "head"]
    # The network's first weight and its two output layers are never pruned.
    assert groups[1]["prunable"] == [False, True, True, False, False]
    assert "1    5 tensors" in "\n".join(lines)
    assert ours[0] == [0.1, 0.0, 0.0]
    assert plainly(host) == ours
    assert Path("runs/results.csv").read_text() == log
    assert log.count("\n") == 5


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_hosts_own_choice_of_optimizer(host: Path, run_folder: Path, name: str) -> None:
    lines: list[str] = []
    ours = train(host, "--optimizer", name, "--epochs", "1", lines=lines)
    assert lines[0] == f"SP in place of torch.optim.{name}. The host's parameter groups:"
    assert "momentum=0.8 " in lines[-1] or "momentum=0.8 " in lines[-2], "the host's warm-up sets it"
    assert plainly(host, "--optimizer", name, "--epochs", "1") == ours


def test_length_is_worked_out_and_the_average_has_the_zeros(host: Path, run_folder: Path) -> None:
    lines: list[str] = []
    steps = len(train(host, lines=lines, sigma_backbone=0.5, sigma_head=0.25, every=1))
    # 2 epochs with the warm-up's short accumulation, then 3 steps in each
    saved = checkpoint(host)
    record = yaml.safe_load(Path("runs/sp.yaml").read_text())
    assert record["progress"]["total_steps"] == record["progress"]["steps"] == steps
    assert record["progress"]["sparsity"] == {"backbone": 0.5, "head": 0.25}
    assert "zeros: 50.0 % of the backbone's weights, 25.0 % of the head's weights" in lines[-1]
    # 6*6*9 and 6*8*9 weights, the one prunable tensor of each
    expected = {"model.1.conv.weight": 162, "model.2.conv.weight": 108}
    for delivered in (saved["ema"], saved["model"]):
        assert {name: count for name, count in zeros(delivered).items() if count} == expected


def test_resume_takes_the_settings_from_the_run(host: Path, run_folder: Path) -> None:
    train(host, "--stop", "2", sigma_head=0.5, rho=0.5, every=1, lr=0.02)
    lines: list[str] = []
    steps = len(train(host, "--resume", "runs/weights/last.pt", lines=lines))
    saved = checkpoint(host)
    group = saved["optimizer"]["param_groups"][1]
    assert (group["rho"], group["sigmas"]["sigma_head"], group["initial_lr"], saved["epoch"]) == (0.5, 0.5, 0.02, 3)
    assert zeros(saved["ema"])["model.2.conv.weight"] == 216
    assert any("state restored" in line for line in lines)
    first = saved["optimizer"]["param_groups"][0]
    assert first["total_steps"] == first["k"] == first["run"]["steps"]
    assert steps == 6
    uninterrupted = len(train(host))
    assert first["k"] == uninterrupted


def test_resume_with_other_settings_is_refused(host: Path, run_folder: Path) -> None:
    train(host, "--stop", "1", rho=0.5)
    with pytest.raises(UserError, match=r"had rho 0\.5: go on without rho=0\.7"):
        train(host, "--resume", "runs/weights/last.pt", rho=0.7)
    Path("runs/sp.yaml").write_text("nothing\n")
    with pytest.raises(UserError, match=r"sp\.yaml: not a record"):
        train(host, "--resume", "runs/weights/last.pt")


def test_state_of_another_number_of_classes(host: Path, run_folder: Path) -> None:
    train(host, "--epochs", "1")
    with pytest.raises(UserError, match=r"not SP's for this model; strip it first: python -c"):
        train(host, "--weights", "runs/weights/last.pt", "--classes", "3")


def test_nothing_left_to_train(host: Path, run_folder: Path) -> None:
    with pytest.raises(UserError, match="every parameter of the host's network is frozen"):
        train(host, "--freeze")


@pytest.mark.parametrize("warm", ["1", "2"])
def test_weights_warmed_from_above_end_the_run(host: Path, run_folder: Path, warm: str) -> None:
    with pytest.raises(UserError, match=rf"begins group {warm} \((backbone, head|norm)\) above its lr"):
        train(host, "--warm", warm)
    assert not Path("runs/weights/last.pt").exists()


def test_backbone_of_another_length(host: Path, run_folder: Path) -> None:
    lines: list[str] = []
    train(host, "--epochs", "1", lines=lines, backbone=1)
    assert "  backbone: layers 0 to 0 of the cfg" in lines
    assert checkpoint(host)["optimizer"]["param_groups"][1]["roles"] == ["backbone", *["head"] * 4]


def test_nine_generations_keep_no_model_alive(host: Path, run_folder: Path) -> None:
    living: list[int] = []

    def count(line: str) -> None:
        if line.startswith("SP in place"):
            gc.collect()
            tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.nn.Parameter))
            living.append(sum(p.numel() for p in tensors))

    assert run_script(host, ["--evolve", "9", "--epochs", "1", "--width", "24"], script=SCRIPT, report=count) == 0
    assert len(living) == 9
    assert max(living) < 1.5 * living[0]


def test_other_scripts_are_named(host: Path, run_folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"other training scripts, for --script: det/train\.py, train_aux\.py; .*swap_opt"
    ):
        run_script(host, [])


def test_length_that_nobody_says(host: Path, run_folder: Path) -> None:
    with pytest.raises(UserError, match="give total_steps=N"):
        train(host, "--epochs", "1", sigma_head=0.5)


def test_an_auxiliary_loss_on_a_gpu(host: Path, run_folder: Path) -> None:
    with PretendCuda():
        with pytest.raises(Mismatch):
            run_script(host, [], script="train_aux.py", compat=False, report=print)
        assert run_script(host, [], script="train_aux.py", report=print) == 0
    first, second = json.loads(Path("losses.txt").read_text())
    assert second < first
