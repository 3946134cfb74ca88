"""PyPI's yolov5, of the later family: biases first, a log of three rates; a black box in a folder of its own."""

import csv
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from pypi_host import Host, installed
from support.datasets import ROW, yolo_set

pytestmark = pytest.mark.slow

# Of its time: the hub's client of today has lost a name that it imports, setuptools a module.
PACKAGES = shlex.split("""
    yolov5==7.0.14 huggingface_hub==0.23.5 setuptools<81 thop ultralytics roboflow requests-toolbelt python-dotenv
    filetype pi-heif pillow-heif pillow-avif-plugin filelock fsspec fire termcolor gitpython gitdb smmap
""")
COMMON = shlex.split("""
    --weights= --cfg yolov5n.yaml --data data.yaml --batch-size 4 --img 64 --device cpu --workers 0 --project runs
    --noautoanchor --name
""")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Host:
    site = installed("yolov5", tmp_path_factory.mktemp("host"), *PACKAGES)
    folder = tmp_path_factory.mktemp("run")
    yolo_set(folder, {f"{split}/{index}": ROW for split in ("train", "val") for index in range(4)}, ["box"])
    shutil.copy(site / "yolov5" / "models" / "yolov5n.yaml", folder)
    # The host fetches a font to label its pictures with; any will do.
    shutil.copy(next(site.rglob("DejaVuSans.ttf")), folder / "Arial.ttf")
    return Host(folder, site, "yolov5", first=True, YOLOV5_CONFIG_DIR=str(folder))


def log(program: Host, name: str) -> list[dict[str, str]]:
    text = (program.folder / "runs" / name / "results.csv").read_text().splitlines()
    return list(csv.DictReader(line.replace(" ", "") for line in text))


def test_two_epochs_as_the_host_logs_them(program: Host) -> None:
    printed = program.plug_in("--sp", "sigma_backbone=0.5", "--", *COMMON, "sp", "--epochs", "2")
    for row in ("60 bias", "33 backbone, 27 head", "57 norm", "layers 0 to 9"):
        assert row in printed
    program.plainly(*COMMON, "sgd", "--epochs", "2")
    ours, plain = log(program, "sp"), log(program, "sgd")
    assert list(ours[0]) == list(plain[0])
    for name in ("x/lr0", "x/lr1", "x/lr2"):
        assert [row[name] for row in ours] == [row[name] for row in plain]
    assert float(ours[0]["train/box_loss"]) == pytest.approx(float(plain[0]["train/box_loss"]), rel=1e-4)


def test_adamw_by_the_hosts_flag_resume_validate_export(program: Host) -> None:
    printed = program.plug_in(
        "--sp", "rho=0.5", "--", *COMMON, "adamw", "--epochs", "2", "--optimizer", "AdamW", "--save-period", "1"
    )
    assert "SP in place of torch.optim.AdamW" in printed
    weights = program.folder / "runs" / "adamw" / "weights"
    resumed = program.plug_in("--", "--resume", str(weights / "epoch0.pt"))
    assert "state restored from the checkpoint" in resumed
    record = yaml.safe_load((program.folder / "runs" / "adamw" / "sp.yaml").read_text())
    assert (record["settings"]["rho"], record["progress"]["steps"]) == (0.5, 2)
    last = str(weights / "last.pt")
    program.plug_in(
        "--script",
        "val.py",
        "--",
        "--weights",
        last,
        *shlex.split("--data data.yaml --img 64 --device cpu --workers 0"),
    )
    program.plug_in("--script", "export.py", "--", "--weights", last, "--img", "64", "--include", "torchscript")
    assert Path(last).with_suffix(".torchscript").is_file()
