"""The original's own trainer, as PyPI's yolov7detect ships it: a black box in a folder outside the repository."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.datasets import ROW, yolo_set
from support.launcher import CHECKOUT, Program

# Its declared dependencies are years old: without them, then what its trainer imports, beside what is here already.
PACKAGES = shlex.split("""
    yolov7detect==1.0.1 pandas scipy seaborn matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil
    six pillow packaging requests certifi charset-normalizer idna urllib3 psutil tensorboard tensorboard-data-server
    absl-py grpcio markdown protobuf werkzeug markupsafe tqdm pyyaml
""")
# The host's own optimizer: the compatibility patches only, no swap.
PLAIN = """
import runpy, sys
from sp_yolo.plugins.compat import modern_stack
sys.argv = sys.argv[1:]
with modern_stack(lambda: None):
    runpy.run_module("yolov7.train", run_name="__main__", alter_sys=True)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the host's package: where it is installed, or a new one."""
    installed = importlib.util.find_spec("yolov7")
    if installed and installed.origin:
        return Path(installed.origin).parents[1]
    folder = tmp_path_factory.mktemp("host")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PACKAGES]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    return folder


class Host(Program):
    """Commands in one folder, with the host importable."""

    def __init__(self, folder: Path, site: Path) -> None:
        paths = os.pathsep.join((str(folder), str(CHECKOUT)))
        super().__init__(folder, PYTHONPATH=paths, WANDB_MODE="disabled")
        self.host = site / "yolov7"
        # The host's packages come last, so that torch's own dependencies are the ones already installed.
        start = f"import sys; sys.path.append({str(site)!r})"
        (folder / "sitecustomize.py").write_text(start)

    def __call__(self, *argv: str) -> str:
        done = self.run(*argv, script=None)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def plug_in(self, *argv: str) -> str:
        return self("-m", "sp_yolo.cli", "yolov7", str(self.host), *argv)

    def losses(self, name: str) -> list[list[str]]:
        """Box, objectness, class and total loss of each epoch; with a single batch an epoch, of each step."""
        rows = (self.folder / "runs" / name / "results.txt").read_text().splitlines()
        return [row.split()[2:6] for row in rows]


@pytest.fixture(scope="module")
def program(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tmp_path_factory.mktemp("run")
    yolo_set(folder, {f"{split}/{index}": ROW for split in ("train", "val") for index in range(4)}, ["box"])
    cfg = (CHECKOUT / "sp_yolo" / "models" / "cfg" / "yolov7-tiny.yaml").read_text()
    (folder / "cfg.yaml").write_text(cfg.replace("nc: 80", "nc: 1"))
    shutil.copy(CHECKOUT / "hyp" / "hyp.scratch.tiny.yaml", folder / "hyp.yaml")
    return Host(folder, site)


COMMON = shlex.split("""
    --weights= --cfg cfg.yaml --data data.yaml --hyp hyp.yaml --epochs 2 --batch-size 4 --img-size 64 64
    --device cpu --workers 0 --project runs --noautoanchor --name
""")


def test_train_resume_and_test(program: Host) -> None:
    printed = program.plug_in("--sp", "lr=0.1", "--", *COMMON, "sp")
    # 22 + 36 convolutions, 58 biases, 55 BatchNorm weights and 6 implicit vectors
    for row in ("0 backbone   22", "1 head       36", "2 bias       58", "3 norm       61", "layers 0 to 28"):
        assert row in printed
    # The host's own count of what it handed over
    assert "Optimizer groups: 58 .bias, 58 conv.weight, 61 other" in printed

    program("-c", PLAIN, "train.py", *COMMON, "sgd")
    assert program.losses("sp")[0] == program.losses("sgd")[0]
    assert program.losses("sp")[1] != program.losses("sgd")[1]

    resumed = program.plug_in("--sp", "lr=0.1", "--", "--resume", "runs/sp/weights/epoch_000.pt")
    assert "state restored from the checkpoint" in resumed
    assert len(program.losses("sp")) == 2

    shutil.copy(program.folder / "runs/sp/weights/best.pt", program.folder / "yolov7.pt")
    # Without --weights: this host's test.py fails on the list that its own flag makes; yolov7.pt is its default.
    arguments = "--data data.yaml --img-size 64 --batch-size 2 --device cpu --project runs --name test"
    assert "Results saved to runs/test" in program.plug_in("--script", "test.py", "--", *shlex.split(arguments))


def test_checkpoint_holds_sp_and_loads_here(program: Host) -> None:
    from sp_yolo.models import build_model, load_weights

    program.plug_in("--sp", "rho=0.5", "--", *COMMON, "kept")
    inspect = "import torch; s = torch.load('runs/kept/weights/epoch_001.pt', weights_only=False)['optimizer']; "
    inspect += "print([g['name'] for g in s['param_groups']], s['param_groups'][0]['k'])"
    assert "['backbone', 'head', 'bias', 'norm'] 2" in program(
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
