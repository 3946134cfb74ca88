"""What people get wrong: one line, exit code 2, no traceback, nothing half-made."""

from pathlib import Path

import pytest
from support.datasets import voc_object, voc_set
from support.launcher import Program, one_error, small

from sp_yolo.cli import main_train

FLAGS = """
--weights --cfg --data --hyp --epochs --batch-size --img-size --rect --resume --nosave --notest --noautoanchor --freeze
--cache-images --image-weights --device --multi-scale --single-cls --adam --sync-bn --local_rank --workers --project
--name --exist-ok --quad --linear-lr --label-smoothing --v5-metric --save_period --img --batch --cache
"""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean --epochs? (all flags: train_sp.py --help)"),
        (["--epochs", "three"], "argument --epochs: invalid int value: 'three' (all"),
        (["--amp", "fp8"], "--amp fp8: must be 'auto' or 'off' or 'bf16' or 'fp16'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_typed_wrong_is_one_line(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main_train(flags)
    except SystemExit as stopped:  # argparse's own refusals
        code = stopped.code
    assert code == 2 and not list(tmp_path.iterdir())
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith(f"error: {words}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hyp", "nosuch.yaml"], "nosuch.yaml: no such file"),
        (["--set", "lr0=abc"], "lr0 = 'abc': must be a number"),
        (["--set", "nosuchkey=1"], "unknown hyperparameter 'nosuchkey'"),
        (["--set", "lr0"], "KEY=VALUE"),
        (["--cfg", "yolov8"], "yolov8"),
        (["--weights", "nosuch.pt"], "--weights nosuch.pt: no such file"),
        (["--device", "cuda:99"], "--device"),
        (["--device", "gpu"], "--device gpu"),
        (["--optimizer", "adamz"], "--optimizer adamz"),
        (["--freeze", "400"], "--freeze 400"),
        (["--resume", "nosuch.pt"], "nosuch.pt"),
        (["--bucket", "x"], "--log wandb"),
        (["--entity", "x"], "--log wandb here, the entity its own variable WANDB_ENTITY"),
        (["--upload_dataset"], "--log wandb"),
        (["--bbox_interval", "2"], "--log wandb"),
        (["--artifact_alias", "x"], "--log wandb"),
        (["--log", "comet"], "--log comet: must be 'tensorboard' or 'wandb' or 'mlflow' or 'trackio'"),
        (["--batch", "many"], "--batch-size many: must be a whole number or 'auto'"),
        (["--augment-with", "nosuch_module:f"], "--augment-with nosuch_module:f: No module named"),
        (["--batch", "0"], "--batch-size 0: must be at least 1"),
        (["--data", "nosuch.yaml"], "nosuch.yaml: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flag_mistakes(
    flags: list[str],
    words: str,
    toy_yaml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main_train([*small(toy_yaml), *flags]) == (3 if "99" in flags[-1] else 2)
    assert words in one_error(capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


GOOD = dict.fromkeys("0123", voc_object())


@pytest.mark.parametrize("x1", ["nan", "abc", "18"], ids=["nan", "word", "no width"])
def test_broken_voc_box_is_counted_and_training_goes_on(
    x1: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = voc_set(tmp_path / "set", {**GOOD, "0": GOOD["0"] + voc_object(box=(x1, 4, 18, 12))}).path
    assert main_train(small(data, "--epochs", "1")) == 2
    assert "1 of 5 boxes would be lost" in one_error(capsys.readouterr().err) and not (tmp_path / "runs").exists()
    assert main_train(small(data, "--epochs", "1", "--accept-losses")) == 0
    assert "0.xml:5" in capsys.readouterr().out


def test_image_of_zero_bytes_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = voc_set(tmp_path / "set", GOOD).path
    (tmp_path / "set" / "JPEGImages" / "2.jpg").write_bytes(b"")
    assert main_train(small(data, "--epochs", "1")) == 2
    assert "1 of 4 images unread (1 empty file)" in one_error(capsys.readouterr().err)
    assert main_train(small(data, "--epochs", "1", "--accept-losses")) == 0
    out = capsys.readouterr().out
    assert "2.jpg: empty file" in out and "3 training images" in out


def test_missing_dataset_folder(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: images/train\nval: images/val\nnames: [a]\n")
    done = program.run("--data", str(path))
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {path}:1: train: no such file or folder: {tmp_path / 'images/train'}"


def test_unknown_flag_is_refused_by_name(program: Program) -> None:
    done = program.run("--epoch", "3")
    assert done.returncode == 2 and "--epoch" in done.stderr and "Traceback" not in done.stderr


def test_every_flag_of_the_original_is_known() -> None:
    """The flags of the original's train.py, as people type them."""
    from sp_yolo.cli import parser_of

    parser = parser_of("train")
    known = {flag for action in parser._actions for flag in action.option_strings}
    wanted = FLAGS.split()
    assert set(wanted) <= known
