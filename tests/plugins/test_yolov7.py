"""The plug-in around a host of our own; the original itself is run by test_original_host.py."""

import argparse
import inspect
import json
import os
import random
import runpy
import sys
from pathlib import Path

import fake_host
import numpy as np
import pytest
import torch

from sp_yolo import cli
from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.optim import SP
from sp_yolo.plugins import patch_yolov7
from sp_yolo.plugins.checkout import find_host, process_state
from sp_yolo.plugins.compat import modern_stack
from sp_yolo.plugins.yolov7 import run_script

# torch.optim hides the modules that define its classes.
SGD_MODULE, ADAM_MODULE = (sys.modules[f"torch.optim.{name}"] for name in ("sgd", "adam"))


def silent(line: str) -> None:
    pass


def train(checkout: Path, *arguments: str, report=silent, **options) -> dict:
    assert run_script(checkout, arguments, report=report, **options) == 0
    return json.loads(Path("log.json").read_text())


def checkpoint(name: str, checkout: Path) -> dict:
    """A checkpoint of the host, whose model classes are importable only from its folder."""
    with patch_yolov7(checkout, report=silent):
        return torch.load(name)


def error_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command answers with."""
    assert cli.main(["yolov7", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# Names as in the fake host's modules, in the order of its groups: two backbone rows, one head row, the detection head.
NAMES = [
    ["model.0.bn.weight", "model.1.bn.weight", "model.2.bn.weight", "model.3.im.0.implicit"],
    ["model.0.conv.weight", "model.1.conv.weight", "model.2.conv.weight", "model.3.m.0.weight"],
    ["model.0.bn.bias", "model.1.bn.bias", "model.2.bn.bias", "model.3.m.0.bias"],
]
ROLES = [["norm"] * 4, ["backbone", "backbone", "head", "head"], ["bias"] * 4]


def test_groups_and_summary(checkout: Path, run_folder: Path) -> None:
    lines: list[str] = []
    train(checkout, report=lines.append)
    groups = checkpoint("epoch1.pt", checkout)["optimizer"]["param_groups"]
    assert [group["param_names"] for group in groups] == NAMES
    assert [group["roles"] for group in groups] == ROLES
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0005, 0.0]
    text = "\n".join(lines)
    # 4*3*9 + 6*4*9 + 8*6*9 + 2*8 weights
    words = "  1    4 tensors         772 parameters  weight_decay 0.0005  2 backbone, 2 head"
    for row in (words, "layers 0 to 1", "lr=0.05"):
        assert row in text


def test_warm_up_schedule_checkpoints_and_stripping_are_the_hosts(checkout: Path, run_folder: Path) -> None:
    steps = train(checkout)["steps"]
    assert [step["lr"][2] for step in steps[:2]] == pytest.approx([0.1, 0.1 + (0.05 - 0.1) / 4])
    assert [step["lr"][0] for step in steps[:2]] == pytest.approx([0.0, 0.05 / 4])
    assert steps[-1]["lr"] == pytest.approx([0.05 * 0.75] * 3)  # the schedule's factor of the last epoch
    assert steps[-1]["loss"] < steps[0]["loss"]
    stripped = checkpoint("last.pt", checkout)
    assert stripped["optimizer"] is None
    assert type(stripped["model"]).__name__ == "Model"


def test_first_loss_is_that_of_plain_sgd(checkout: Path, run_folder: Path) -> None:
    ours = train(checkout)["steps"]
    host = find_host(checkout)
    with process_state(host), modern_stack(lambda: None):
        sys.argv[1:] = []
        runpy.run_path(str(host.script), run_name="__main__")
    plain = json.loads(Path("log.json").read_text())["steps"]
    assert [step["lr"] for step in ours] == [step["lr"] for step in plain]
    assert ours[0]["loss"] == plain[0]["loss"]
    assert ours[-1]["loss"] != plain[-1]["loss"]


def test_settings_reach_the_optimizer(checkout: Path, run_folder: Path) -> None:
    settings = {"lr": 0.2, "rho": 0.5, "sigma_head": 0.5, "total_steps": 6, "every": 1, "end": 0.5}
    train(checkout, **settings)
    saved = checkpoint("epoch1.pt", checkout)
    weights = saved["optimizer"]["param_groups"][1]
    assert (weights["initial_lr"], weights["rho"]) == (0.2, 0.5)
    for name in ("metric", "rcap", "growth", "decoupled"):  # one SP: what is not set is the class's
        assert weights[name] == inspect.signature(SP).parameters[name].default
    assert weights["sigmas"] == {"sigma_backbone": 0.0, "sigma_head": 0.5}
    layers = saved["model"].model
    zeros = [
        int((weight == 0).sum()) for weight in (layers[1].conv.weight, layers[2].conv.weight, layers[3].m[0].weight)
    ]
    assert zeros == [0, 8 * 6 * 9 // 2, 0]  # the head's one prunable tensor: not the backbone, not the detection layer


def test_frozen_parameters_stay_where_the_host_has_them(checkout: Path, run_folder: Path) -> None:
    lines: list[str] = []
    train(checkout, "--freeze", "0", report=lines.append)
    groups = checkpoint("epoch1.pt", checkout)["optimizer"]["param_groups"]
    assert [group["param_names"] for group in groups] == NAMES
    assert [group["roles"][0] for group in groups] == ["frozen"] * 3
    assert "1 frozen, 1 backbone, 2 head" in "\n".join(lines)


def test_resume_restores_state_and_goes_on(checkout: Path, run_folder: Path) -> None:
    train(checkout, "--epochs", "2")
    lines: list[str] = []
    resumed = train(checkout, "--epochs", "3", "--weights", "epoch1.pt", report=lines.append)
    assert len(resumed["steps"]) == 3
    assert any("state restored" in line for line in lines)
    # 3 batches an epoch: the counter of steps went on from 6
    states = [checkpoint(f"epoch{epoch}.pt", checkout)["optimizer"]["param_groups"][0]["k"] for epoch in (1, 2)]
    assert states == [6, 9]


def test_resume_with_another_lr_is_refused(checkout: Path, run_folder: Path) -> None:
    train(checkout, lr=0.2)
    with pytest.raises(UserError, match=r"go on with lr=0\.2"):
        train(checkout, "--weights", "epoch0.pt")
    with pytest.raises(UserError, match=r"had lr 0\.2: go on without lr=0\.3"):
        train(checkout, "--weights", "epoch0.pt", lr=0.3)


def test_checkpoint_of_another_optimizer_is_refused(tmp_path: Path, checkout: Path, run_folder: Path) -> None:
    train(checkout)
    saved = checkpoint("epoch0.pt", checkout)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(12)]
    saved["optimizer"] = torch.optim.SGD([{"params": parameters[i::3]} for i in range(3)], lr=0.1).state_dict()
    with patch_yolov7(checkout, report=silent):
        import models.yolo as host_module

        saved["model"].__class__ = host_module.Model
        torch.save({**saved, "model": host_module.Model(), "ema": None}, "sgd.pt")
    with pytest.raises(UserError, match="not SP's"):
        train(checkout, "--weights", "sgd.pt")


def test_a_package_is_a_host_too(tmp_path: Path, run_folder: Path) -> None:
    package = fake_host.write_package(tmp_path / "hostpackage")
    log = train(package)
    assert log["argv"][0] == str(package / "train.py")
    assert len(log["steps"][0]["lr"]) == 3
    assert not [name for name in sys.modules if name.startswith("hostpackage")]


class Globals:
    """What the plug-in touches, as it is now."""

    def __init__(self) -> None:
        self.functions = (torch.load, torch.save, torch.tensor, random.randrange, torch.optim.SGD, torch.optim.Adam)
        self.functions += (torch.Tensor.__getitem__, random.choices, argparse.ArgumentParser.parse_known_args)
        self.functions += (torch.optim.lr_scheduler.LRScheduler.step,)
        self.functions += (SGD_MODULE.SGD, ADAM_MODULE.Adam)
        self.numpy = dict(vars(np))
        self.lists = (list(sys.path), list(sys.argv), dict(os.environ))

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Globals)
        same = all(a is b for a, b in zip(self.functions, other.functions, strict=True))
        return same and self.numpy == other.numpy and self.lists == other.lists


def test_nothing_global_survives(checkout: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "utils", json)  # a module of the user's with the name of one of the host's
    before = Globals()
    with patch_yolov7(checkout, report=silent):
        assert issubclass(torch.optim.SGD, SP)
        assert SGD_MODULE.SGD is torch.optim.SGD
        assert vars(np)["int"] is int
        assert sys.path[0] == str(checkout)
        assert Globals() != before
    assert Globals() == before
    train(checkout)
    assert Globals() == before
    with pytest.raises(ZeroDivisionError), patch_yolov7(checkout, report=silent):
        raise ZeroDivisionError
    assert Globals() == before
    assert sys.modules["utils"] is json
    assert "models.yolo" not in sys.modules


def test_without_compat_the_stack_is_untouched(checkout: Path) -> None:
    before = Globals()
    with patch_yolov7(checkout, compat=False, report=silent):
        assert torch.tensor is before.functions[2]
        assert random.choices is before.functions[7]
        assert dict(vars(np)) == before.numpy
        assert issubclass(torch.optim.SGD, SP)


def test_adam_is_replaced_too(checkout: Path, run_folder: Path) -> None:
    lines: list[str] = []
    train(checkout, "--adam", "--epochs", "1", report=lines.append)
    assert lines[0] == "SP in place of torch.optim.Adam. The host's parameter groups:"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("weights.pop()", "left 1 trainable parameters out of its optimizer, first model.3.m.0.weight"),
        ("weights.append(biases[0])", r"model\.0\.bn\.bias, of shape \(4,\), twice"),
        ("biases.append(torch.nn.Parameter(torch.zeros(7)))", r"a tensor of shape \(7,\) that is not the model's"),
        ("others = [torch.nn.Parameter(torch.zeros(7))]", "parameters of no network alive"),
    ],
)
def test_groups_that_differ_from_the_model(tmp_path: Path, run_folder: Path, groups: str, message: str) -> None:
    host = fake_host.write_checkout(tmp_path / "host", groups=groups)
    with pytest.raises(UserError, match=message):
        train(host)
    assert not Path("epoch0.pt").exists()


def test_an_optimizer_built_past_the_hook_does_not_train(tmp_path: Path, run_folder: Path) -> None:
    build = "type('SGD', (optim.RMSprop,), {})(others, lr=opt.lr0)"
    host = fake_host.write_checkout(tmp_path / "host", build=build, groups="optim.SGD")
    with pytest.raises(UserError, match=r"trains with \S+SGD, not built as torch\.optim\.SGD"):
        train(host)
    assert not Path("epoch0.pt").exists()


def test_a_host_that_trains_nothing_is_told(checkout: Path, run_folder: Path) -> None:
    (checkout / "train.py").write_text("import torch\nname = torch.optim.SGD\n")
    with pytest.raises(UserError, match=r"without building torch\.optim\.SGD, Adam or AdamW: .* swap_optimizer"):
        run_script(checkout, ["--epochs", "1"], report=silent)


def test_missing_hooks_are_named(tmp_path: Path, run_folder: Path, capsys) -> None:
    assert "nowhere: no such folder" in error_line(capsys, "nowhere", "--", "--epochs", "1")
    broken = fake_host.write_checkout(tmp_path / "broken")
    assert "no train_aux.py" in error_line(capsys, str(broken), "--script", "train_aux.py", "--", "--epochs", "1")
    (broken / "train.py").write_text("print('no optimizer here')\n")
    assert "without building torch.optim.SGD" in error_line(capsys, str(broken), "--", "--epochs", "1")
    (broken / "train.py").write_text("import a_package_nobody_has\n")
    with pytest.raises(EnvironmentFault, match="a_package_nobody_has"):
        run_script(broken, ["--epochs", "1"])


def test_missing_weights_ask_no_network(checkout: Path, run_folder: Path, capsys) -> None:
    assert "--weights none.pt: no such file" in error_line(capsys, str(checkout), "--", "--weights", "none.pt")


def test_other_scripts_need_no_optimizer(checkout: Path, run_folder: Path) -> None:
    (checkout / "test.py").write_text(
        "import sys, numpy; print(numpy.trapz([1, 1])); sys.exit(sys.argv[1] == '--fail')\n"
    )
    assert run_script(checkout, ["--ok"], script="test.py") == 0
    assert run_script(checkout, ["--fail"], script="test.py") == 1


def test_local_rank_in_both_spellings_and_from_torchrun(checkout: Path, run_folder: Path, monkeypatch) -> None:
    assert train(checkout, "--local-rank=3", "--epochs", "1")["local_rank"] == 3
    assert train(checkout, "--local-rank", "2", "--epochs", "1")["local_rank"] == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train(checkout, "--epochs", "1")["local_rank"] == 1
    assert train(checkout, "--epochs", "1", "--local_rank", "0")["local_rank"] == 0


def test_command_line(checkout: Path, run_folder: Path, capsys) -> None:
    argv = ["yolov7", str(checkout), "--sp", "lr=0.2", "held=false", "--sp", "rho=0.5", "--", "--epochs", "1"]
    assert cli.main(argv) == 0
    assert len(json.loads(Path("log.json").read_text())["steps"]) == 3
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("lr=0.2", "held=False", "rho=0.5", "metric=fisher"))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lr", "--sp lr: expected KEY=VALUE"),
        ("lr=fast", "--sp lr=fast: expected a number"),
        ("held=maybe", "--sp held=maybe: expected true or false"),
        ("every=1.5", "--sp every=1.5: expected a whole number"),
        ("momentum=0.9", "--sp momentum: set by the host's own hyp file"),
        ("lamda=1", "--sp lamda: no such setting; known: backbone, decoupled,"),
        ("rho=2", "--sp: invalid rho: 2.0"),
        ("sigma_head=1.5", "--sp: invalid sigma: 1.5"),
        ("sigma_head=0.5", "give total_steps=N"),
    ],
)
def test_wrong_settings(checkout: Path, run_folder: Path, capsys, assignment: str, message: str) -> None:
    assert message in error_line(capsys, str(checkout), "--sp", assignment, "--", "--epochs", "1")


def test_the_hosts_arguments_come_after_two_dashes(checkout: Path, capsys) -> None:
    for arguments in (["--epochs", "1"], []):
        with pytest.raises(SystemExit):
            cli.main(["yolov7", str(checkout), *arguments])
        assert "the host's own arguments come after --" in capsys.readouterr().err
